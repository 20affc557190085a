"""The small SigLIP of the embedded datasets: pictures and words by the sigmoid loss.

    python -m jflow.scratch.siglip --out jflow/scratch/assets/siglip_shapes [field=value ...]

Image tower: jflow's Siglip with its attention pool. Text tower: a small Llama, read at its last
token and thrown away afterwards. Source: SigLIP (arXiv 2303.15343), algorithm 1.

Each picture comes with two kinds of text: an inventory of all that is in it, true of this picture
alone, and statements such as "a red object top left", each of which may be true of several. Since
the loss judges every pair on its own, it takes both. With inventories alone, training stayed at
the colors for thousands of steps; pictures of one object come first because shapes are learned
from them alone in a few hundred.
"""

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jflow.data.scenes import SIDE, Object, Scene
from jflow.images import from_uint8
from jflow.models.llama import Llama, LlamaConfig
from jflow.models.siglip import Siglip, SiglipConfig
from jflow.prompts import Tokenizer
from jflow.scratch.parts import command, pictures
from jflow.scratch.tokenizer import tokenizer_files

INVENTORY_TOKENS = 28  # four objects
STATEMENT_TOKENS = 6
STATEMENTS = 3  # of each picture
RETRIEVAL = 64  # candidates


@dataclass(frozen=True)
class ContrastiveConfig:
    """examples: pictures of the training split. alone_steps: how many of the first steps see only
    those with one object."""

    siglip: SiglipConfig = field(
        default_factory=lambda: SiglipConfig(
            image_size=SIDE, patch_size=8, width=128, layers=4, heads=4, mlp_ratio=3
        )
    )
    text_layers: int = 2
    examples: int = 60_000
    batch_size: int = 64
    steps: int = 5_500
    alone_steps: int = 800
    warmup_steps: int = 100
    learning_rate: float = 1e-3
    seed: int = 0


def place(o: Object) -> str:
    """Where an object lies, in thirds of the picture."""
    row = ("top", "middle", "bottom")[min(int(3 * o.y / SIDE), 2)]
    return f"{row} {('left', 'center', 'right')[min(int(3 * o.x / SIDE), 2)]}"


def inventory(scene: Scene, rng: np.random.Generator) -> str:
    """Every object with its color and place, in random order."""
    phrases = [f"a {o.color} {o.shape} {place(o)}" for o in scene.objects]
    return " , ".join(phrases[i] for i in rng.permutation(len(phrases)))


def statement(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str]:
    """Color, shape and place of a random object, up to two of them left out ("")."""
    o = scene.objects[rng.integers(len(scene.objects))]
    kept = rng.permutation(3)[: rng.integers(1, 4)]
    return tuple(v if i in kept else "" for i, v in enumerate((o.color, o.shape, place(o))))


def holds(said: tuple[str, str, str], scene: Scene) -> bool:
    """Is a statement true of some object?"""
    return any(
        all(want in ("", has) for want, has in zip(said, (o.color, o.shape, place(o)), strict=True))
        for o in scene.objects
    )


def sigmoid_loss(
    images: jax.Array, texts: jax.Array, matches: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """-1/n sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)), z 1 where text j is true of image i,
    else -1.

    images [n, D] and texts [m, D] of length 1; matches [n, m] bool.
    """
    z = 2 * matches.astype(jnp.float32) - 1
    return -jnp.sum(jax.nn.log_sigmoid(z * (scale * images @ texts.T + bias))) / len(images)


def embed_images(vit: Siglip, params: dict, pixels: jax.Array) -> jax.Array:
    """[n, S, S, 3] in [-1, 1] -> [n, D] of length 1."""
    features = vit.apply({"params": params["vit"]}, pixels)
    return _unit(vit.apply({"params": params["vit"]}, features, method="pool"))


def embed_texts(text: Llama, params: dict, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """[m, L] and [m] -> [m, D] of length 1."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (positions < lengths[:, None]).astype(jnp.int32)
    x = text.apply({"params": params["text"]}, tokens, method="embed")
    hidden = text.apply({"params": params["text"]}, x, positions, segments).hidden
    return _unit(hidden[jnp.arange(len(tokens)), lengths - 1])


def _unit(v: jax.Array) -> jax.Array:
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)


def tokenize(texts: list[str], length: int, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """[m, length] int32, padded at the right, and [m] lengths."""
    rows = [tokenizer.encode(text)[:length] for text in texts]
    tokens = np.full((len(rows), length), tokenizer.pad_id, np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    return tokens, np.array([len(row) for row in rows], np.int32)


def make_batch(
    drawn: np.ndarray, scenes: list[Scene], tokenizer: Tokenizer, rng: np.random.Generator
) -> dict:
    """Pictures with an inventory and STATEMENTS statements of each, and which of all is true."""
    said = [statement(scene, rng) for scene in scenes for _ in range(STATEMENTS)]
    phrases = [" ".join(("a", color, shape or "object", where)) for color, shape, where in said]
    true = np.array([[holds(words, scene) for words in said] for scene in scenes])
    return {
        "pixels": from_uint8(drawn),
        "inventories": tokenize([inventory(s, rng) for s in scenes], INVENTORY_TOKENS, tokenizer),
        "statements": tokenize(phrases, STATEMENT_TOKENS, tokenizer),
        "matches": np.concatenate([np.eye(len(scenes), dtype=bool), true], axis=1),
    }


def train(config: ContrastiveConfig) -> tuple[dict, float]:
    """The image tower's parameters, and how often it finds the text of an unseen picture among
    those of RETRIEVAL pictures."""
    tokenizer = Tokenizer.from_files(tokenizer_files(config.siglip.num_tokens))
    vit, width = Siglip(config.siglip), config.siglip.width
    text = Llama(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.siglip.heads,
        )
    )
    data, scenes = pictures(config.seed, "train", config.examples)
    tests, their_scenes = pictures(config.seed, "seen", 8 * RETRIEVAL)
    rng = np.random.default_rng(config.seed)
    batch = make_batch(data[:2], scenes[:2], tokenizer, rng)

    keys = jax.random.split(jax.random.key(config.seed))
    tokens, _ = batch["statements"]
    positions = jnp.zeros(tokens.shape, jnp.int32)
    params = {
        "vit": vit.init(keys[0], batch["pixels"], method=lambda m, x: m.pool(m(x)))["params"],
        "text": text.init(
            keys[1],
            tokens,
            method=lambda m, t: m.logits(m(m.embed(t), positions, positions).hidden),
        )["params"],
        # Of the logits; in units in which Adam moves them ten times as fast as other parameters:
        # with SigLIP's own beginning (log 10, -10) a short run is over before they fit.
        "scale": jnp.log(20.0) / 10,
        "bias": jnp.array(-1.0),
    }
    rate = optax.warmup_cosine_decay_schedule(
        0, config.learning_rate, config.warmup_steps, config.steps, config.learning_rate / 100
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=1e-4)
    )

    def loss(params, batch):
        images = embed_images(vit, params, batch["pixels"])
        texts = [embed_texts(text, params, *batch[k]) for k in ("inventories", "statements")]
        texts, matches = jnp.concatenate(texts), batch["matches"]
        return sigmoid_loss(
            images, texts, matches, jnp.exp(10 * params["scale"]), 10 * params["bias"]
        )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, moments, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    @jax.jit
    def found(params, batch):
        images = embed_images(vit, params, batch["pixels"])
        texts = embed_texts(text, params, *batch["inventories"])
        return jnp.mean(jnp.argmax(images @ texts.T, axis=1) == jnp.arange(len(images)))

    alone = np.array([i for i, scene in enumerate(scenes) if len(scene.objects) == 1])
    moments = optimizer.init(params)
    bar = tqdm(range(config.steps), "training")
    for number in bar:
        pool = alone if number < config.alone_steps else np.arange(len(data))
        chosen = rng.choice(pool, config.batch_size, replace=False)
        batch = make_batch(data[chosen], [scenes[i] for i in chosen], tokenizer, rng)
        params, moments, value = step(params, moments, batch)
        if number % 50 == 0:
            share = found(
                params, make_batch(tests[:RETRIEVAL], their_scenes[:RETRIEVAL], tokenizer, rng)
            )
            bar.set_postfix(loss=f"{value:.3f}", retrieval=f"{share:.2f}")
    shares = [
        found(params, make_batch(tests[i:j], their_scenes[i:j], tokenizer, rng))
        for i, j in pairwise(range(0, len(tests) + 1, RETRIEVAL))
    ]
    return jax.device_get(params["vit"]), float(np.mean(shares))


def _make(config: ContrastiveConfig) -> tuple[dict, dict, str]:
    params, retrieval = train(config)
    said = f"the right one of {RETRIEVAL} texts for {retrieval:.1%} of new pictures"
    return asdict(config.siglip), params, said


if __name__ == "__main__":
    sys.exit(command("jflow.scratch.siglip", __doc__, ContrastiveConfig(), _make))
