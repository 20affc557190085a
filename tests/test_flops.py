"""Operations in closed form: against design.md, and against those of the traced programs."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow.batch import Batch
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, init_params
from jflow.models.llama import LlamaConfig
from jflow.models.repa import RepaHead
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.training import flops
from jflow.training.flops import Work
from tests.tiny_training import image_row, stack, text_row

RELEASED = JanusFlowConfig(
    LlamaConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
    ),
    SiglipConfig(),
    GenEncoderConfig(input_channels=4, kernel_size=2, stride=2, padding=0),
    GenDecoderConfig(out_channels=4, upsamples=1),
)
STAGE_2 = {
    "language_model",
    "repa",
    "vision_und_enc_aligner",
    *(f"vision_gen_{side}_{part}" for side in ("enc", "dec") for part in ("aligner", "model")),
}


def test_the_released_model_costs_what_design_md_says():
    """Section 3 of design.md, worked out apart from this code; its digits are the tolerance."""
    language = RELEASED.language
    assert flops.token_flops(language) == pytest.approx(2.466e9, rel=2e-4)
    assert flops.pair_flops(language) == 4 * 2048 * 24
    assert flops.siglip_flops(RELEASED.siglip) == pytest.approx(0.381e12, rel=2e-3)
    assert flops.vae_encode_flops(VAEConfig(), 384) == pytest.approx(0.62e12, rel=1e-3)
    aligner = 2 * 576 * 768 * 2048
    encoder = flops.encoder_flops(RELEASED.gen_encoder, 576) + aligner
    decoder = flops.decoder_flops(RELEASED.gen_decoder, RELEASED.gen_encoder, 576) + aligner
    assert encoder == pytest.approx(12.8e9, rel=2e-3)
    assert decoder == pytest.approx(45.5e9, rel=2e-3)

    cost = flops.step_cost(RELEASED, VAEConfig(), 2048, STAGE_2)
    drawn = cost.of(Work(tokens=643, pairs=643 * 644 // 2, generated=1))
    assert drawn == pytest.approx(6.09e12, rel=1e-3)
    cached = flops.step_cost(RELEASED, VAEConfig(), 2048, STAGE_2, {"vae"})
    drawn = cached.of(Work(tokens=643, pairs=643 * 644 // 2, generated=1))
    assert drawn == pytest.approx(5.47e12, rel=1e-3)
    asked = cost.of(Work(tokens=640, pairs=640 * 641 // 2, targets=640, understood=1))
    assert asked == pytest.approx(6.03e12, rel=5e-3)


def products(jaxpr) -> int:
    """Operations of all dot_general and convolutions of a program, loops multiplied out."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape  # HWIO
            total += 2 * math.prod(kernel[:3]) * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.core.jaxprs_in_params(equation.params):
            total += times * products(inner)
    return total


def counted(function, *args) -> int:
    return products(jax.make_jaxpr(function)(*args).jaxpr)


@pytest.mark.parametrize("seed", range(4))
def test_formulas_equal_the_operations_of_the_program(seed):
    """Random dimensions, grouped queries included. Our depthwise 7x7 is no convolution of XLA's,
    nor on more than 4x4 a product: its 98 operations a channel are taken off there. The VAE's and
    the uvit's biases are no products.
    """
    rng = np.random.default_rng(seed)
    patch, channels = int(rng.choice([4, 8])), int(rng.choice([8, 16]))
    heads = int(rng.choice([2, 4]))
    hidden = heads * 8
    config = JanusFlowConfig(
        LlamaConfig(
            vocab_size=50,
            hidden_size=hidden,
            intermediate_size=int(rng.integers(20, 60)),
            num_hidden_layers=int(rng.integers(1, 4)),
            num_attention_heads=heads,
            num_key_value_heads=int(rng.choice([1, heads])),
        ),
        SiglipConfig(image_size=32, patch_size=patch, width=16, layers=2, heads=2),
        GenEncoderConfig(
            input_channels=3,
            kernel_size=patch,
            stride=patch,
            padding=0,
            block_out_channels=(channels,),
            layers_in_middle=int(rng.integers(1, 3)),
            hidden_size=hidden,
        ),
        GenDecoderConfig(
            in_channels=24,
            out_channels=3,
            block_out_channels=(channels,),
            upsamples=patch.bit_length() - 1,
            layers_in_middle=int(rng.integers(1, 3)),
            hidden_size=hidden,
        ),
    )
    model = JanusFlow(config)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    grid, length = (32 // patch) ** 2, 9

    def method(name, *args, **more):
        return lambda p: model.apply({"params": p}, *args, method=name, **more)

    x, positions = jnp.zeros((1, length, hidden)), jnp.arange(length)[None]
    language = counted(method("language", x, positions, jnp.ones_like(positions)), params)
    # The program computes the masked half of the scores too.
    assert language == pytest.approx(
        length * flops.token_flops(config.language)
        + length**2 * flops.pair_flops(config.language), rel=1e-12
    )  # fmt: skip
    siglip = counted(method("image_features", jnp.zeros((1, 32, 32, 3))), params)
    assert siglip == flops.siglip_flops(config.siglip)

    encoder, decoder = config.gen_encoder, config.gen_decoder
    t_emb = jnp.zeros((1, hidden))
    drawn = counted(method("encode_latents", jnp.zeros((1, 32, 32, 3)), jnp.zeros(1)), params)
    side = 32 // patch
    skip = jnp.zeros((1, side, side, channels))
    read = counted(method("decode_velocity", jnp.zeros((1, grid, hidden)), skip, t_emb), params)
    layers = encoder.layers_in_middle, decoder.layers_in_middle
    shifted = 98 * grid if grid > 16 else 0
    depthwise = [shifted * n * c for n, c in zip(layers, (channels, channels + 24), strict=True)]
    aligners = 2 * grid * hidden * channels, 2 * grid * hidden * 24
    assert drawn == flops.encoder_flops(encoder, grid) - depthwise[0] + aligners[0]
    assert read == flops.decoder_flops(decoder, encoder, grid) - depthwise[1] + aligners[1]

    vae = AutoencoderKL(
        VAEConfig(
            block_out_channels=(4, *rng.choice([4, 8], 2).tolist()),
            layers_per_block=int(rng.integers(1, 3)),
            norm_num_groups=2,
        )
    )
    pixels = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(vae.init, jax.random.key(0), pixels)
    encode = counted(lambda v: vae.apply(v, pixels, method="encode"), shapes)
    assert encode == flops.vae_encode_flops(vae.config, 32)

    head = RepaHead(features=16, hidden_size=24)
    hidden_states = jnp.zeros((grid, hidden))
    shapes = jax.eval_shape(head.init, jax.random.key(0), hidden_states)
    repa = counted(lambda v: head.apply(v, hidden_states), shapes)
    with_head = flops.step_cost(config, None, 24, {"repa"}, {"siglip"})
    without = flops.step_cost(config, None, None, set())
    assert with_head.generated - without.generated == 3 * repa


def test_what_is_trained_decides_how_often_a_product_counts():
    """Once forward, once for its input where something before is trained, once for its weights."""

    def cost(*trained):
        return flops.step_cost(RELEASED, None, None, set(trained), {"siglip"})

    token = flops.token_flops(RELEASED.language)
    assert cost("vision_gen_enc_model").tokens == 2 * token
    assert cost("language_model").tokens == 3 * token
    siglip, aligner = flops.siglip_flops(RELEASED.siglip), 2 * 576 * 1024 * 2048
    assert cost().understood == siglip + aligner
    assert cost("vision_und_enc_aligner").understood == siglip + 2 * aligner
    assert cost("vision_und_enc_aligner", "vision_und_enc_model").understood == 3 * (
        siglip + aligner
    )


def test_work_of_a_batch_counts_what_is_not_padding():
    text = stack(
        [
            text_row([(20, 5, True), (21, 7, False)], 20, 2),  # 10 + 7 positions, 4 + 6 targets
            text_row([(22, 4, True)], 20, 2),  # 9 positions, 3 targets
        ]
    )
    # 4 + 5, then 5 with the one token that a dropped prompt leaves; 2 + 5; nothing.
    images = stack(
        [
            image_row([(1, 4, False), (2, 3, True)], 22, 2),
            image_row([(3, 2, False)], 22, 2),
            image_row([], 22, 2),
        ]
    )

    def pairs(*lengths):
        return sum(n * (n + 1) // 2 for n in lengths)

    asked = Work(26, pairs(10, 7, 9), 13, 2, 0)
    drawn = Work(9 + 6 + 7, pairs(9, 6, 7), 0, 0, 3)
    assert flops.count_work(Batch(text, None)) == asked
    assert flops.count_work(Batch(None, images)) == drawn
    both = [a + b for a, b in zip(asked, drawn, strict=True)]
    assert flops.count_work(Batch(text, images)) == Work(*both)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H200", 790e12),
        ("NVIDIA H100 80GB HBM3", 790e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_peaks_of_known_chips(kind, peak):
    device = SimpleNamespace(device_kind=kind, platform="none of this machine's")
    assert flops.peak_flops(device, "bfloat16") == peak


def test_the_peak_of_a_cpu_is_measured():
    """Between what any machine does and what none has."""
    assert 1e8 < flops.peak_flops(jax.devices("cpu")[0], "float32") < 1e14
