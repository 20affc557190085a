"""What benchmarks/sampling.py measures: the sizes, the inputs and how many operations they take;
and random parameters."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

RELEASED = Path(__file__).resolve().parent.parent / "tests" / "golden" / "keys_janusflow_1p3b.json"
# No image is read here, so the understanding encoder is only as large as it has to be.
SIGLIP_SIZES = {"patch_size": 16, "width": 16, "layers": 1, "heads": 1, "mlp_ratio": 1}
GUIDANCE_SCALE = 2.0
LATENT_SIDE, LATENT_CHANNELS = 48, 4
GRID_TOKENS = (LATENT_SIDE // 2) ** 2


@dataclass(frozen=True)
class Workload:
    """One model and what is asked of it; both sides get the same.

    weights: folder of a safetensors file in the released names. config: the released config.json
    with another depth and vocabulary. steps: Euler steps an image. prompt_tokens: before the time
    token. prefix_tokens, new_tokens: of an answer. matmul_size: of the square product that stands
    for the machine's peak.
    """

    weights: Path
    config: dict
    dtype: str
    steps: int
    prompt_tokens: int
    prefix_tokens: int
    new_tokens: int
    matmul_size: int

    @property
    def vocab_size(self) -> int:
        return self.config["language_config"]["vocab_size"]

    def prompts(self, batch: int) -> np.ndarray:
        """[B, P] token ids, different in every row."""
        rng = np.random.default_rng(0)
        return rng.integers(0, self.vocab_size, (batch, self.prompt_tokens), np.int32)

    def noise(self, batch: int) -> np.ndarray:
        """[B, 48, 48, 4] float32."""
        shape = (batch, LATENT_SIDE, LATENT_SIDE, LATENT_CHANNELS)
        return np.random.default_rng(1).standard_normal(shape, np.float32)

    def question(self) -> np.ndarray:
        """[1, T] token ids."""
        rng = np.random.default_rng(2)
        return rng.integers(0, self.vocab_size, (1, self.prefix_tokens), np.int32)


def released_config(layers: int, vocab_size: int) -> dict:
    """config.json of JanusFlow-1.3B with another depth and vocabulary."""
    config = json.loads(RELEASED.read_text(encoding="utf-8"))["config"]
    sizes = {"num_hidden_layers": layers, "vocab_size": vocab_size}
    return config | {"language_config": config["language_config"] | sizes}


def language_flops(config: dict, new: int, before: int) -> float:
    """Operations of the decoder over `new` tokens behind `before` cached ones, without its head.

    A multiplication and an addition are two. Per layer and token 2 (4 d^2 + 3 d ff) for the
    products and 4 d for each token that attention sees (design.md, section 3).
    """
    language = config["language_config"]
    d, ff = language["hidden_size"], language["intermediate_size"]
    seen = new * before + new * (new + 1) / 2
    products = new * 2 * (4 * d**2 + 3 * d * ff)
    return language["num_hidden_layers"] * (products + 4 * d * seen)


def generation_flops(config: dict) -> tuple[float, float]:
    """(encoder, decoder) operations for one 48x48 latent, each with its aligner."""
    d = config["language_config"]["hidden_size"]
    channels = config["vision_gen_enc_config"]["params"]["block_out_channels"][-1]
    patch = 4 * LATENT_CHANNELS

    def blocks(width):  # two ConvNeXt blocks: 7x7 depthwise, C -> 4 C -> C
        return 2 * 2 * GRID_TOKENS * (49 * width + 8 * width**2)

    aligner = 2 * GRID_TOKENS * channels * d
    encoder = blocks(channels) + aligner + 2 * GRID_TOKENS * patch * channels
    decoder = blocks(2 * channels) + aligner + 2 * GRID_TOKENS * 2 * channels * patch
    return encoder, decoder


def image_flops(config: dict, prompt_tokens: int, steps: int, as_released: bool) -> float:
    """Operations for one image with guidance, from the prompt to the latents.

    as_released: the prompt anew in every step, and the encoder on both halves of the guidance;
    otherwise the prompt once and the encoder once a step.
    """
    encoder, decoder = generation_flops(config)
    new = 1 + GRID_TOKENS
    if as_released:
        return steps * 2 * (language_flops(config, prompt_tokens + new, 0) + encoder + decoder)
    step = 2 * language_flops(config, new, prompt_tokens) + encoder + 2 * decoder
    return language_flops(config, prompt_tokens, 0) + steps * step


def answer_flops(config: dict, prefix_tokens: int, new_tokens: int) -> float:
    """Operations of `new_tokens` decoding steps behind a prefix, each with the logits."""
    language = config["language_config"]
    head = 2 * language["hidden_size"] * language["vocab_size"]
    return language_flops(config, new_tokens, prefix_tokens) + new_tokens * head


def weight_bytes(config: dict, dtype: str) -> float:
    """Bytes of weights that one decoding step reads: all layers and the head."""
    language = config["language_config"]
    d, ff = language["hidden_size"], language["intermediate_size"]
    count = language["num_hidden_layers"] * (4 * d**2 + 3 * d * ff) + d * language["vocab_size"]
    return count * (4 if dtype == "float32" else 2)


def random_params(shapes: dict) -> dict:
    """Pieces of one row of random numbers: compiling the model's own initialisation would take
    longer than all steps."""
    numbers = 0.02 * np.random.default_rng(0).standard_normal(2**22, np.float32)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape)
        return jnp.asarray(np.resize(numbers, leaf.shape))

    return jax.tree_util.tree_map_with_path(draw, shapes)
