"""What a step has to compute, in closed form, and what the hardware could: model FLOPs and MFU.

Only products of matrices count (convolutions among them), two operations for a multiply-add.
Forward and backward pass count once: what remat computes again does not, nor padding, nor the half
of the attention matrix that causality hides. So MFU is comparable between set-ups.
"""

import time
from collections.abc import Iterable, Set
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jflow.batch import Batch, ImageRows, TextRows
from jflow.models.janusflow import JanusFlowConfig
from jflow.models.llama import LlamaConfig
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import VAEConfig, latent_side
from jflow.training.config import TrainConfig
from jflow.training.objectives import Modules

# Dense bfloat16 operations per second of one jax.Device, by its device_kind. H100 and H200: the
# fastest matrix product measured (their data sheets say 989e12); the others: data sheets.
PEAK = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 790e12,
    "NVIDIA H200": 790e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device: jax.Device, dtype: str) -> float:
    """Operations per second of a device: from PEAK, or else measured by a product in `dtype`."""
    kinds = [kind for kind in PEAK if device.device_kind.startswith(kind)]
    if kinds:
        return PEAK[max(kinds, key=len)]
    size = 1024 if device.platform == "cpu" else 8192
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


class Work(NamedTuple):
    """What is in a batch, without padding.

    tokens: positions of any kind, those of images included; pairs: of a position and one that it
    sees; targets: tokens to predict; understood, generated: images.
    """

    tokens: int = 0
    pairs: int = 0
    targets: int = 0
    understood: int = 0
    generated: int = 0


def count_work(batch: Batch) -> Work:
    """Of numpy arrays, this process's rows."""
    counts = np.zeros(len(Work._fields), np.int64)
    if batch.text is not None:
        rows = batch.text
        images = np.sum(rows.slots[..., 0] < rows.tokens.shape[1])
        counts += [*_attended(rows), np.sum(rows.targets >= 0), images, 0]
    if batch.images is not None:
        rows = batch.images
        counts += [*_attended(rows), 0, 0, np.sum(rows.sample_ids >= 0)]
    return Work(*counts.tolist())


def _attended(rows: TextRows | ImageRows) -> tuple[int, int]:
    """(positions, pairs) of the segments of some rows."""
    ids = rows.segment_ids
    most = ids.max() + 1
    lengths = np.bincount((ids + most * np.arange(len(ids))[:, None]).ravel())
    lengths[::most] = 0  # padding
    return lengths.sum(), (lengths * (lengths + 1) // 2).sum()


class Cost(NamedTuple):
    """FLOPs of a model's step for one of each field of Work; pairs and images without tokens."""

    tokens: float
    pairs: float
    targets: float
    understood: float
    generated: float

    def of(self, work: Work) -> float:
        return sum(cost * count for cost, count in zip(self, work, strict=True))


def step_cost(
    model: JanusFlowConfig,
    vae: VAEConfig | None,
    repa_hidden_size: int | None,
    trained: Set[str],
    cached: Set[str] = frozenset(),
) -> Cost:
    """What training costs.

    A product costs as much again for the gradient of its input, where something before it is
    trained, and once more for that of its weights, where they are.

    Args:
      vae: None where the latents are the pixels. repa_hidden_size: None without REPA.
      trained: names of the modules with trained parameters: "language_model", ...
      cached: what does not run for images to generate, "vae" and "siglip" of it.
    """
    siglip, encoder, decoder = model.siglip, model.gen_encoder, model.gen_decoder
    size = latent_side(siglip.image_size, vae)
    grid, width = encoder.tokens_along(size) ** 2, model.language.hidden_size

    def times(name: str, flows: bool) -> int:
        """How often a module's product is computed, forward pass and gradients; `flows`: whether
        something before it is trained."""
        return 1 + flows + (name in trained)

    vision = "vision_und_enc_model" in trained
    understood = siglip_flops(siglip) * (3 if vision else 1)
    understood += 2 * siglip.num_tokens * siglip.width * width * times(
        "vision_und_enc_aligner", vision
    )  # fmt: skip
    before = "vision_gen_enc_model" in trained
    generated = encoder_flops(encoder, grid) * (3 if before else 1)
    generated += 2 * grid * encoder.channels * width * times("vision_gen_enc_aligner", before)
    generated += 2 * grid * width * decoder.in_channels * times("vision_gen_dec_aligner", True)
    generated += decoder_flops(decoder, encoder, grid) * times("vision_gen_dec_model", True)
    if repa_hidden_size is not None:
        hidden = repa_hidden_size
        head = 2 * grid * (width * hidden + hidden**2 + hidden * siglip.width)
        generated += head * times("repa", True)
        generated += 0 if "siglip" in cached else siglip_flops(siglip)
    if vae is not None and "vae" not in cached:
        generated += vae_encode_flops(vae, siglip.image_size)
    language = times("language_model", True)
    return Cost(
        tokens=token_flops(model.language) * language,
        pairs=pair_flops(model.language) * 3,
        targets=2 * width * model.language.vocab_size * language,
        understood=understood,
        generated=generated,
    )


def stage_cost(
    config: TrainConfig, modules: Modules, trained: Iterable[str], cached: Set[str]
) -> Cost:
    """`step_cost` of a stage. trained: the paths of its trained parameters."""
    return step_cost(
        modules.model.config,
        modules.vae.config if modules.vae else None,
        config.repa_hidden_size if config.objective.repa_weight else None,
        module_names(trained),
        cached,
    )


def module_names(paths: Iterable[str]) -> set[str]:
    """The modules that parameters belong to: "janusflow/language_model/..." to "language_model"."""
    return {name for path in paths for name in path.split("/")[:2]}


def token_flops(config: LlamaConfig) -> float:
    """The language model's products with weights for one token, forward, without its head."""
    d, heads = config.hidden_size, config.num_attention_heads + config.kv_heads
    per_layer = 2 * d * config.head_width * heads * 2 + 6 * d * config.intermediate_size
    return config.num_hidden_layers * per_layer


def pair_flops(config: LlamaConfig) -> float:
    """Score and weighted sum for one pair of tokens in all layers, forward."""
    return config.num_hidden_layers * 4 * config.num_attention_heads * config.head_width


def siglip_flops(config: SiglipConfig) -> float:
    """One image's features, forward."""
    n, w = config.num_tokens, config.width
    layer = n * (8 * w**2 + 4 * w * config.mlp_width) + 4 * w * n**2
    return 2 * n * 3 * config.patch_size**2 * w + config.layers * layer


def _convnext_flops(layers: int, channels: int, hidden: int, grid: int) -> float:
    """Blocks of uvit.ConvNeXtBlock on one image of `grid` positions, a square: 7x7, MLP, FiLM.

    On 4x4 and less each position reads all of them, see `depthwise_conv`.
    """
    taps = grid if grid <= 16 else 49
    return layers * (grid * (2 * taps * channels + 16 * channels**2) + 4 * hidden * channels)


def encoder_flops(config: GenEncoderConfig, grid: int) -> float:
    """The generation encoder on one image that becomes `grid` tokens, forward."""
    c, hidden = config.channels, config.hidden_size
    time_embedding = 2 * (config.block_out_channels[0] * hidden + hidden**2)
    conv = 2 * grid * config.kernel_size**2 * config.input_channels * c
    blocks = _convnext_flops(config.layers_in_middle, c, hidden, grid)
    return time_embedding + conv + config.use_mid_block * blocks


def decoder_flops(config: GenDecoderConfig, encoder: GenEncoderConfig, grid: int) -> float:
    """The generation decoder on one image of `grid` tokens, forward."""
    channels = config.in_channels + encoder.channels
    blocks = _convnext_flops(config.layers_in_middle, channels, config.hidden_size, grid)
    total = config.use_mid_block * blocks
    for i in range(config.upsamples):
        last = i == config.upsamples - 1
        out = config.out_channels if last else config.block_out_channels[-1]
        total += 2 * grid * channels * 4 * out
        channels, grid = out, 4 * grid
    return total


def _conv(n: int, c_in: int, c_out: int, kernel: int = 3) -> float:
    """A convolution at n places."""
    return 2 * n * kernel**2 * c_in * c_out


def _resnet(n: int, c_in: int, c_out: int) -> float:
    shortcut = _conv(n, c_in, c_out, 1) if c_in != c_out else 0
    return _conv(n, c_in, c_out) + _conv(n, c_out, c_out) + shortcut


def _middle(n: int, c: int) -> float:
    """Two blocks, and attention between them."""
    return 2 * _resnet(n, c, c) + 4 * _conv(n, c, c, 1) + 4 * n**2 * c


def vae_encode_flops(config: VAEConfig, size: int) -> float:
    """The VAE's encoder on one image of size x size pixels."""
    n, c = size**2, config.block_out_channels[0]
    total = _conv(n, config.in_channels, c)
    for i, channels in enumerate(config.block_out_channels):
        for _ in range(config.layers_per_block):
            total += _resnet(n, c, channels)
            c = channels
        if i < len(config.block_out_channels) - 1:
            n //= 4
            total += _conv(n, c, c)
    moments = 2 * config.latent_channels
    return total + _middle(n, c) + _conv(n, c, moments) + _conv(n, moments, moments, 1)


def vae_decode_flops(config: VAEConfig, size: int) -> float:
    """The VAE's decoder on the latents of one image of size x size pixels.

    Where it doubles the resolution as vae.DoubledConv does: 4/9 of what repeated pixels would take.
    """
    n, c = (size // config.downscale) ** 2, config.block_out_channels[-1]
    latent = config.latent_channels
    total = _conv(n, latent, latent, 1) + _conv(n, latent, c) + _middle(n, c)
    for i, channels in enumerate(reversed(config.block_out_channels)):
        for _ in range(config.layers_per_block + 1):
            total += _resnet(n, c, channels)
            c = channels
        if i < len(config.block_out_channels) - 1:
            n *= 4
            total += 4 / 9 * _conv(n, c, c)
    return total + _conv(n, c, config.out_channels)
