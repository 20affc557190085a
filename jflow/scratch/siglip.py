"""The small SigLIP of the embedded datasets: pictures and words by the sigmoid loss.

    python -m jflow.scratch.siglip --out jflow/scratch/assets/siglip_shapes [field=value ...]

Image tower: jflow's Siglip with its attention pool. Text tower: a small Llama, read at its last
token and thrown away afterwards. Source: SigLIP (arXiv 2303.15343), algorithm 1.

Each picture comes with two kinds of text: an inventory of all that is in it, true of this picture
alone, and statements such as "a red object top left", each of which may be true of several. Since
the loss judges every pair on its own, it takes both. With inventories alone, training stayed at
the colors for thousands of steps; pictures of one object come first because shapes are learned
from them alone in a few hundred.

Shapes come before colors: the first pictures, and half of all later ones, are shown in colors that
have no name, and nothing is said of these. Learned in the order in which they are easy, colors
before shapes, red would come to mean "no square" where red squares are held out.
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

from jflow.data.scenes import BACKGROUND, COLORS, HELD_OUT, SHAPES, SIDE, Scene
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
LEFT_OUT, NOTHING = -1, -2  # instead of an attribute's number
MOST_OBJECTS = 4
STATEMENT_TOKENS = 6  # at most: BOS, "a", color, shape, and two words for the place
STATEMENTS = 3  # of each picture
NEAR = 0.25  # of a color, in sides of the RGB cube
TOGETHER = 50  # steps in one program
RETRIEVAL = 64  # candidates


@dataclass(frozen=True)
class ContrastiveConfig:
    """examples: pictures of the training split. alone_steps: how many of the first steps see only
    those with one object, all in colors without names. recolored: the share of such colors later.
    """

    siglip: SiglipConfig = field(
        default_factory=lambda: SiglipConfig(
            image_size=SIDE, patch_size=8, width=128, layers=4, heads=4, mlp_ratio=3
        )
    )
    text_layers: int = 2
    examples: int = 150_000
    batch_size: int = 256
    steps: int = 14_000
    alone_steps: int = 1_500
    recolored: float = 0.5
    warmup_steps: int = 200
    learning_rate: float = 1e-3
    seed: int = 0


def facts(scene: Scene) -> np.ndarray:
    """[4, 3] numbers in ATTRIBUTES of each object's color, shape and place, NOTHING where there is
    no object."""
    found = np.full((MOST_OBJECTS, 3), NOTHING, np.int32)
    for row, o in zip(found, scene.objects, strict=False):
        place = 3 * _third(o.y) + _third(o.x)
        row[:] = list(COLORS).index(o.color), SHAPES.index(o.shape), place
    return found


def _third(along: float) -> int:
    return min(int(3 * along / SIDE), 2)


def statements(known: jax.Array, key: jax.Array) -> jax.Array:
    """STATEMENTS random ones that are true of each scene.  Facts [n, 4, 3] -> [n, STATEMENTS, 3],
    color, shape and place of one of its objects, up to two of them LEFT_OUT."""
    keys = jax.random.split(key, 3)
    count, shape = _objects(known).sum(-1), (len(known), STATEMENTS)
    which = jax.random.randint(keys[0], shape, 0, count[:, None])
    said = jnp.take_along_axis(known, which[..., None], axis=1)
    # A color without a name is the first to be left out.
    order = jax.random.uniform(keys[1], said.shape) + (said == LEFT_OUT)
    kept = order.argsort(-1).argsort(-1) < jax.random.randint(keys[2], (*shape, 1), 1, 4)
    return jnp.where(kept, said, LEFT_OUT)


def verdicts(said: jax.Array, known: jax.Array) -> jax.Array:
    """What a scene says to a statement: 1 where it is true of some object, -1 where it is false, 0
    where that depends on a color without a name.  [m, 3], facts [n, 4, 3] -> [n, m]."""
    said, known = said[:, None], known[:, None]
    fits = (said == LEFT_OUT) | (said == known)
    may_fit = fits | (known == LEFT_OUT)
    true, undecided = (which.all(-1).any(-1) for which in (fits, may_fit))
    return jnp.where(true, 1, jnp.where(undecided, 0, -1))


def _objects(known: jax.Array) -> jax.Array:
    return known[..., 2] != NOTHING


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


def inventories(
    known: jax.Array, tokens: jax.Array, lengths: jax.Array, comma: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The statements of all objects of each scene, in random order and with commas between.

    Facts [n, 4, 3], and `phrases` -> tokens [n, 24], padded at the right, and lengths [n].
    """
    there = _objects(known)
    order = (jax.random.uniform(key, there.shape) - there).argsort(-1)
    said = jnp.take_along_axis(known, order[..., None], axis=1)
    said = tuple(jnp.moveaxis(said, -1, 0))
    count = jnp.where(jnp.take_along_axis(there, order, axis=1), lengths[said], 0)
    # The comma takes the place of BOS.
    listed = tokens[said].at[:, 1:, 0].set(comma).reshape(len(known), -1)
    used = (jnp.arange(tokens.shape[-1]) < count[..., None]).reshape(len(known), -1)
    return jnp.take_along_axis(listed, jnp.argsort(~used, stable=True), axis=1), count.sum(-1)


def turn(key: jax.Array) -> jax.Array:
    """A random rotation in three dimensions, with a mirror or without, [3, 3] (Shoemake 1992)."""
    w, x, y, z = _unit(jax.random.normal(key, (4,)))
    rotation = jnp.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    return rotation * jax.random.rademacher(jax.random.fold_in(key, 1), ())


def recolor(pixels: jax.Array, known: jax.Array, key: jax.Array) -> jax.Array:
    """A picture in colors without names on the same background: all differences from this turned
    and made smaller. Where that would bring an object near a color that its shape is held out for
    (before what leaves the cube is clipped), it becomes lighter or darker greys instead.

    [32, 32, 3] in [-1, 1], facts [4, 3].
    """
    keys = jax.random.split(key, 4)
    background, names = 2 * BACKGROUND - 1, 2 * jnp.array(list(COLORS.values())) - 1
    away = pixels - background
    change = turn(keys[0]) * jax.random.uniform(keys[1], minval=0.6, maxval=0.9)
    become = background + (names[known[:, 0]] - background) @ change
    near = jnp.linalg.norm(become[:, None] - names, axis=-1) < 2 * NEAR
    held_out = jnp.array([[color in HELD_OUT[shape] for color in COLORS] for shape in SHAPES])
    spoiled = jnp.any(near & held_out[known[:, 1]] & _objects(known)[:, None])
    grey = jax.random.uniform(keys[2], minval=0.15, maxval=0.4)
    grey *= jax.random.rademacher(keys[3], ()) * jnp.linalg.norm(away, axis=-1, keepdims=True)
    return jnp.clip(background + jnp.where(spoiled, grey, away @ change), -1, 1)


def make_batch(
    drawn: jax.Array,
    known: jax.Array,
    texts: tuple[jax.Array, jax.Array, int],
    key: jax.Array,
    recolored: int | jax.Array = 0,
) -> dict:
    """Pictures with an inventory and STATEMENTS statements of each, and which of all is true.

    drawn [n, 32, 32, 3] uint8; known, their facts [n, 4, 3]; texts, `phrases` and a comma;
    recolored, how many of the pictures are shown in colors without names: nothing is said of
    these colors, and they have no inventory.
    """
    keys, (tokens, lengths, _) = jax.random.split(key, 3), texts
    pixels, nameless = from_uint8(drawn), jnp.arange(len(drawn)) < recolored
    others = jax.vmap(recolor)(pixels, known, jax.random.split(keys[2], len(drawn)))
    pixels = jnp.where(nameless[:, None, None, None], others, pixels)
    hidden = (nameless[:, None] & _objects(known))[..., None] & (jnp.arange(3) == 0)
    known = jnp.where(hidden, LEFT_OUT, known)
    said = statements(known, keys[0]).reshape(-1, 3)
    same = (2 * jnp.eye(len(known), dtype=int) - 1) * ~nameless * ~nameless[:, None]
    return {
        "pixels": pixels,
        "inventories": inventories(known, *texts, keys[1]),
        "statements": (tokens[tuple(said.T)], lengths[tuple(said.T)]),
        "matches": jnp.concatenate([same, verdicts(said, known)], axis=1),
    }


def train(config: ContrastiveConfig) -> tuple[dict, dict[str, float]]:
    """The image tower's parameters, and shares of new pictures: "retrieval", for which it finds the
    inventory among those of RETRIEVAL pictures, and "seen" and "unseen", of one object of such a
    pair, for which it finds "a circle" and the like among SHAPES."""
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
    new = {split: _pictures(config.seed, split, 8 * RETRIEVAL) for split in ("seen", "unseen")}
    single = {split: _single(*shown) for split, shown in new.items()}
    tests, their_facts = new["seen"]
    rng, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    texts = (*map(jnp.asarray, phrases(tokenizer)), tokenizer.encode(",")[-1])
    batch = make_batch(data[:2], known[:2], texts, key)

    keys = jax.random.split(key)
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
    def several(params, moments, data, known, chosen, first, recolored):
        def step(carry, at):
            params, moments = carry
            number, rows = at
            here = jax.random.fold_in(key, number)
            batch = make_batch(data[rows], known[rows], texts, here, recolored)
            value, gradient = jax.value_and_grad(loss)(params, batch)
            updates, moments = optimizer.update(gradient, moments, params)
            return (optax.apply_updates(params, updates), moments), value

        numbers = first + jnp.arange(len(chosen))
        (params, moments), values = jax.lax.scan(step, (params, moments), (numbers, chosen))
        return params, moments, values.mean()

    @jax.jit
    def found(params, data, known):
        batch = make_batch(data, known, texts, key)
        images = embed_images(vit, params, batch["pixels"])
        like = images @ embed_texts(text, params, *batch["inventories"]).T
        return jnp.argmax(like, axis=1) == jnp.arange(len(data))

    @jax.jit
    def named(params, drawn, shapes):
        said = LEFT_OUT, np.arange(len(SHAPES)), LEFT_OUT
        choices = embed_texts(text, params, texts[0][said], texts[1][said])
        images = embed_images(vit, params, from_uint8(drawn))
        return jnp.mean(jnp.argmax(images @ choices.T, axis=1) == shapes)

    alone, everything = np.flatnonzero(_objects(known).sum(-1) == 1), np.arange(len(data))
    data, known = jax.device_put((data, known))
    moments = optimizer.init(params)
    bar = tqdm(range(0, config.steps, TOGETHER), "training")
    for first in bar:
        begins, size = first < config.alone_steps, config.batch_size
        pool, share = (alone, 1.0) if begins else (everything, config.recolored)
        count = min(TOGETHER, config.steps - first)
        chosen = np.stack([rng.choice(pool, size, replace=False) for _ in range(count)])
        params, moments, value = several(
            params, moments, data, known, chosen, first, round(share * size)
        )
        if first % 500 == 0:
            right = found(params, tests[:RETRIEVAL], their_facts[:RETRIEVAL])
            shapes = {split: f"{named(params, *shown):.2f}" for split, shown in single.items()}
            bar.set_postfix(loss=f"{value:.3f}", retrieval=f"{right.mean():.2f}", **shapes)
    right = [
        found(params, tests[i:j], their_facts[i:j])
        for i, j in pairwise(range(0, len(tests) + 1, RETRIEVAL))
    ]
    shapes = {split: float(named(params, *shown)) for split, shown in single.items()}
    return jax.device_get(params["vit"]), {"retrieval": float(np.mean(right))} | shapes


def _single(drawn: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of the pictures that hold one object, [n, 32, 32, 3], and its shape [n]."""
    alone = _objects(known).sum(-1) == 1
    return drawn[alone], known[alone, 0, 1]


def _pictures(seed: int, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [count, 32, 32, 3], and their facts [count, 4, 3]."""
    drawn, scenes = pictures(seed, split, count)
    return drawn, np.stack([facts(scene) for scene in scenes])


def _make(config: ContrastiveConfig) -> tuple[dict, dict, str]:
    params, found = train(config)
    said = (
        f"the right one of {RETRIEVAL} texts for {found['retrieval']:.1%} of new pictures, a "
        f"shape's for {found['seen']:.1%} of seen pairs and {found['unseen']:.1%} of unseen ones"
    )
    return asdict(config.siglip), params, said


if __name__ == "__main__":
    sys.exit(command("jflow.scratch.siglip", __doc__, ContrastiveConfig(), _make))
