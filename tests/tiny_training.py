"""A JanusFlow small enough to train in tests, and packed batches of random samples for it."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from jflow.batch import ImageRows, TextRows
from jflow.models import repa
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, init_params
from jflow.models.layers import Precision
from jflow.models.llama import LlamaConfig
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.training.objectives import Modules

HIDDEN, VOCAB, SIZE, TOKENS = 32, 50, 32, 4  # TOKENS of one image, in both directions

# Compiling takes most of these tests' time, and so half of it.
FAST = {"xla_backend_optimization_level": 0}

CONFIG = JanusFlowConfig(
    language=LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    siglip=SiglipConfig(image_size=SIZE, patch_size=16, width=16, layers=1, heads=2),
    gen_encoder=GenEncoderConfig(
        input_channels=4,
        kernel_size=2,
        stride=2,
        padding=0,
        block_out_channels=(16,),
        layers_in_middle=1,
        hidden_size=HIDDEN,
    ),
    gen_decoder=GenDecoderConfig(
        in_channels=16,
        out_channels=4,
        block_out_channels=(16,),
        upsamples=1,
        layers_in_middle=1,
        hidden_size=HIDDEN,
    ),
)


def modules(compute=jnp.float32) -> Modules:
    precision = Precision(compute=compute)
    vae = VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    return Modules(
        model=JanusFlow(CONFIG, precision),
        vae=AutoencoderKL(vae, dtype=compute),
        repa=repa.RepaHead(features=16, hidden_size=24, precision=precision),
    )


@cache
def params() -> dict:
    """Random parameters, none at a zero of its initialisation; drawn without compiling anything."""
    parts, key, rng = modules(), jax.random.key(0), np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape, np.float32)
        if path[-1].key in ("scale", "weight"):
            return jnp.asarray(1 + 0.1 * noise)
        wide = leaf.ndim >= 2 and path[-1].key != "bias"
        return jnp.asarray(noise * (leaf.shape[-2] ** -0.5 if wide else 0.1))

    shapes = {
        "janusflow": jax.eval_shape(lambda: init_params(parts.model, key)),
        "vae": jax.eval_shape(lambda: parts.vae.init(key, jnp.zeros((1, SIZE, SIZE, 3))))["params"],
        "repa": jax.eval_shape(lambda: repa.init_params(parts.repa, HIDDEN, key)),
    }
    return jax.tree_util.tree_map_with_path(draw, shapes)


def pixels(sample: int) -> np.ndarray:
    return np.random.default_rng(sample).uniform(-1, 1, (SIZE, SIZE, 3)).astype(np.float32)


def empty_row(length: int) -> dict[str, np.ndarray]:
    """Padding: segment 0, no targets."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "positions", "segment_ids")}
    return row | {"targets": np.full(length, -1, np.int32)}


def image_row(samples: list[tuple[int, int, bool]], length: int, images: int) -> ImageRows:
    """One row of generation samples (id, prompt length, prompt dropped), room for `images`."""
    row = empty_row(length)
    slots = np.full((images, 1 + TOKENS), length, np.int32)
    ids, crops = np.full(images, -1, np.int32), np.zeros((images, SIZE, SIZE, 3), np.float32)
    start = 0
    for i, (sample, prompt, dropped) in enumerate(samples):
        positions = np.arange(prompt + 1 + TOKENS)
        if dropped:
            positions = np.delete(positions, np.arange(1, prompt))
        stop = start + len(positions)
        words = np.random.default_rng(sample).integers(1, VOCAB, prompt)
        row["tokens"][start : stop - 1 - TOKENS] = words[: 1 if dropped else prompt]
        row["positions"][start:stop] = positions
        row["segment_ids"][start:stop] = i + 1
        slots[i] = np.arange(stop - 1 - TOKENS, stop)
        ids[i], crops[i] = sample, pixels(sample)
        start = stop
    row.pop("targets")
    return ImageRows(**row, pixels=crops, slots=slots, sample_ids=ids)


def text_row(samples: list[tuple[int, int, bool]], length: int, images: int) -> TextRows:
    """One row of samples (id, words, has an image): image, then words, targets on the latter."""
    row = empty_row(length)
    slots = np.full((images, 1 + TOKENS), length, np.int32)
    crops = np.zeros((images, SIZE, SIZE, 3), np.float32)
    start = used = 0
    for i, (sample, words, has_image) in enumerate(samples):
        begin = start + (1 + TOKENS if has_image else 0)
        stop = begin + words
        if has_image:
            slots[used], crops[used] = np.arange(start, begin), pixels(sample)
            used += 1
        row["tokens"][begin:stop] = np.random.default_rng(sample).integers(1, VOCAB, words)
        row["targets"][begin : stop - 1] = row["tokens"][begin + 1 : stop]
        row["positions"][start:stop] = np.arange(stop - start)
        row["segment_ids"][start:stop] = i + 1
        start = stop
    return TextRows(**row, pixels=crops, slots=slots)


def stack(rows: list):
    """Rows -> a batch of them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
