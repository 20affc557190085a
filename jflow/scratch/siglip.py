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
from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jflow.data.scenes import COLORS, SHAPES, SIDE, Scene
from jflow.images import from_uint8
from jflow.models.llama import Llama, LlamaConfig
from jflow.models.siglip import Siglip, SiglipConfig
from jflow.prompts import Tokenizer
from jflow.scratch.parts import command, pictures
from jflow.scratch.tokenizer import tokenizer_files

PLACES = tuple(
    f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "center", "right")
)
ATTRIBUTES = (tuple(COLORS), SHAPES, PLACES)
LEFT_OUT, UNNAMED, NOTHING = -1, -2, -3  # instead of an attribute's number
MOST_OBJECTS = 4
STATEMENT_TOKENS = 6  # at most: BOS, "a", color, shape, and two words for the place
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


def facts(scene: Scene) -> np.ndarray:
    """[4, 3] numbers of each object's color, shape and place in ATTRIBUTES; UNNAMED for a color
    without a name, NOTHING where there is no object."""
    found = np.full((MOST_OBJECTS, 3), NOTHING, np.int32)
    for row, o in zip(found, scene.objects, strict=False):
        color = list(COLORS).index(o.color) if o.color else UNNAMED
        row[:] = color, SHAPES.index(o.shape), 3 * _third(o.y) + _third(o.x)
    return found


def _third(along: float) -> int:
    return min(int(3 * along / SIDE), 2)


def statements(known: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """STATEMENTS random ones that are true of each scene.  Facts [n, 4, 3] -> [n, STATEMENTS, 3],
    color, shape and place of one of its objects, up to two of them LEFT_OUT."""
    count = (known[..., 1] != NOTHING).sum(-1)
    which = rng.integers(count[:, None], size=(len(known), STATEMENTS))
    said = np.take_along_axis(known, which[..., None], axis=1)
    # Colors without a name are left out first, and always.
    rank = (rng.random(said.shape) + (said == UNNAMED)).argsort(-1).argsort(-1)
    kept = (rank < rng.integers(1, 4, size=(*which.shape, 1))) & (said != UNNAMED)
    return np.where(kept, said, LEFT_OUT)


def verdicts(said: np.ndarray, known: np.ndarray) -> np.ndarray:
    """What a scene says to a statement: 1 where it is true of some object, 0 where it would be if
    the object's color had the name, else -1.  [m, 3] and facts [n, 4, 3] -> [n, m]."""
    fits = (said[:, None] == LEFT_OUT) | (said[:, None] == known[:, None])
    open_ = fits | (known[:, None] == UNNAMED)
    true, undecided = (which.all(-1).any(-1) for which in (fits, open_))
    return np.where(true, 1, np.where(undecided, 0, -1))


def sigmoid_loss(
    images: jax.Array, texts: jax.Array, matches: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """-1/n sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)), z 1 where text j is true of image i,
    -1 where it is false, and 0 where nothing is to be learned.

    images [n, D] and texts [m, D] of length 1; matches [n, m], z.
    """
    return -jnp.sum(jax.nn.log_sigmoid(matches * (scale * images @ texts.T + bias))) / len(images)


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


@cache
def phrases(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [9, 5, 10, STATEMENT_TOKENS], padded at the right, and lengths [9, 5, 10] of every
    statement; LEFT_OUT is the last along each axis."""
    colors, shapes, places = ((*names, "") for names in ATTRIBUTES)
    shape = len(colors), len(shapes), len(places)
    tokens = np.full((*shape, STATEMENT_TOKENS), tokenizer.pad_id, np.int32)
    lengths = np.zeros(shape, np.int32)
    for i in np.ndindex(shape):
        words = ("a", colors[i[0]], shapes[i[1]] or "object", places[i[2]])
        row = tokenizer.encode(" ".join(filter(None, words)))
        tokens[i][: len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def make_batch(
    drawn: np.ndarray, known: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator
) -> dict:
    """Pictures with an inventory and STATEMENTS statements of each, and which of all is true.

    drawn [n, 32, 32, 3] uint8; known, their facts [n, 4, 3].
    """
    tokens, lengths = phrases(tokenizer)
    # Every object of an inventory is a comma and the five words behind BOS; the first has BOS.
    objects = (known[..., 1] != NOTHING).astype(int)
    order = (rng.random(objects.shape) - objects).argsort(-1)
    inventories = tokens[tuple(np.moveaxis(np.take_along_axis(known, order[..., None], 1), -1, 0))]
    inventories[:, 1:, 0] = tokenizer.encode(",")[-1]
    said = statements(known, rng).reshape(-1, 3)
    # There is no inventory of colors without names.
    same = np.where((known == UNNAMED).any((1, 2)), 0, 2 * np.eye(len(known), dtype=int) - 1)
    return {
        "pixels": from_uint8(drawn),
        "inventories": (inventories.reshape(len(known), -1), STATEMENT_TOKENS * objects.sum(-1)),
        "statements": (tokens[tuple(said.T)], lengths[tuple(said.T)]),
        "matches": np.concatenate([same, verdicts(said, known)], axis=1),
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
    data, known = _pictures(config.seed, "train", config.examples)
    tests, their_facts = _pictures(config.seed, "seen", 8 * RETRIEVAL)
    rng = np.random.default_rng(config.seed)
    batch = make_batch(data[:2], known[:2], tokenizer, rng)

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

    objects, unnamed = (known[..., 1] != NOTHING).sum(-1), (known == UNNAMED).any((1, 2))
    alone = np.flatnonzero((objects == 1) & unnamed)
    moments = optimizer.init(params)
    bar = tqdm(range(config.steps), "training")
    for number in bar:
        pool = alone if number < config.alone_steps else np.arange(len(data))
        chosen = rng.choice(pool, config.batch_size, replace=False)
        batch = make_batch(data[chosen], known[chosen], tokenizer, rng)
        params, moments, value = step(params, moments, batch)
        if number % 50 == 0:
            share = found(
                params, make_batch(tests[:RETRIEVAL], their_facts[:RETRIEVAL], tokenizer, rng)
            )
            bar.set_postfix(loss=f"{value:.3f}", retrieval=f"{share:.2f}")
    shares = [
        found(params, make_batch(tests[i:j], their_facts[i:j], tokenizer, rng))
        for i, j in pairwise(range(0, len(tests) + 1, RETRIEVAL))
    ]
    return jax.device_get(params["vit"]), float(np.mean(shares))


def _pictures(seed: int, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, 32, 32, 3], and their facts [count, 4, 3]."""
    drawn, scenes = pictures(seed, split, count)
    return drawn, np.stack([facts(scene) for scene in scenes])


def _make(config: ContrastiveConfig) -> tuple[dict, dict, str]:
    params, retrieval = train(config)
    said = f"the right one of {RETRIEVAL} texts for {retrieval:.1%} of new pictures"
    return asdict(config.siglip), params, said


if __name__ == "__main__":
    sys.exit(command("jflow.scratch.siglip", __doc__, ContrastiveConfig(), _make))
