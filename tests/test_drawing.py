"""Drawing: what an image depends on, and what it does not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jflow import checkpoints, flow, prompts
from jflow.inference.image import (
    decode_latents,
    encode_pixels,
    initial_noise,
    sample_latents,
)
from jflow.inference.parts import check_parts, drawn_shape, latent_shape, read_processors
from jflow.inference.pipeline import PROMPT_BUCKET, ImageOptions, pad_rows
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, init_params
from jflow.models.layers import Precision
from jflow.models.llama import LlamaConfig
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import VAEConfig
from tests.goldens import golden, nhwc

SHORT, LONG = "a cat", "a long-winded description of a small red circle left of a large blue square"
GEN = golden("golden_tiny_gen")


def latents(tiny, texts, indices, bucket=PROMPT_BUCKET, seed=7, scale=2.0, steps=4, **options):
    rows = [prompts.generation_tokens(tiny.tokenizer, text) for text in texts]
    tokens, lengths = pad_rows(rows, bucket)
    z = initial_noise(seed, np.array(indices), tiny.latent_shape)
    grid = flow.time_grid(steps, official_rounding=options.pop("official_rounding", False))
    return np.asarray(
        sample_latents(
            tiny.model, tiny.params["janusflow"], tokens, lengths, z, grid.timesteps, grid.dt,
            np.float32(scale), **options,
        )
    )  # fmt: skip


def test_an_image_does_not_depend_on_its_batch(tiny):
    """Alone or beside others, whatever the padding: 1e-5 in float32."""
    together = latents(tiny, [SHORT, LONG, SHORT], [0, 0, 3])
    for row, (text, index) in enumerate([(SHORT, 0), (LONG, 0), (SHORT, 3)]):
        alone = latents(tiny, [text], [index], bucket=1)
        np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-5)
    assert np.abs(together[0] - together[2]).max() > 0.1  # another index
    assert np.abs(together[0] - together[1]).max() > 1e-3  # another prompt
    assert np.abs(together[0] - latents(tiny, [SHORT], [0], seed=8)[0]).max() > 0.1


def test_pipeline_images_do_not_depend_on_batch_size_or_other_prompts(tiny):
    options = ImageOptions(steps=3, seed=5)
    some = np.concatenate(list(tiny.generate([SHORT, LONG], 3, options, batch_size=4)))
    alone = np.concatenate(list(tiny.generate([LONG], 2, options, batch_size=1)))
    assert some.shape == (6, 64, 64, 3) and some.dtype == np.uint8
    # Latents agree to 1e-5; a pixel that close to a step of uint8 may fall on its other side.
    assert np.abs(some[3:5].astype(int) - alone).max() <= 1


def test_noise_is_standard_and_per_index():
    noise = np.asarray(initial_noise(3, np.arange(64), (16, 16, 4)))
    # Three standard errors of each.
    assert abs(noise.mean()) < 3 / noise.size**0.5
    assert abs(noise.std() - 1) < 3 / (2 * noise.size) ** 0.5
    np.testing.assert_array_equal(noise[5:7], initial_noise(3, np.array([5, 6]), (16, 16, 4)))


def test_guidance_one_is_the_conditional_half_alone(tiny):
    full = latents(tiny, [SHORT], [0], scale=1.0)
    half = latents(tiny, [SHORT], [0], scale=1.0, guided=False)
    np.testing.assert_allclose(full, half, rtol=0, atol=1e-5)
    # The scale is not even looked at without the second half.
    ignored = latents(tiny, [SHORT], [0], scale=9.0, guided=False)
    np.testing.assert_array_equal(half, ignored)


def test_guidance_interval(tiny):
    """All of the time is guidance, none of it is no guidance, part of it is neither."""
    always = latents(tiny, [LONG], [0], scale=5.0)
    never = latents(tiny, [LONG], [0], guided=False)
    np.testing.assert_allclose(
        latents(tiny, [LONG], [0], scale=5.0, interval=(0.0, 1.0)), always, rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(
        latents(tiny, [LONG], [0], scale=5.0, interval=(0.9, 1.0)), never, rtol=0, atol=1e-5
    )
    # Four steps begin at t = 0, 1/4, 1/2, 3/4: here the last two are guided.
    part = latents(tiny, [LONG], [0], scale=5.0, interval=(0.5, 1.0))
    assert min(np.abs(part - always).max(), np.abs(part - never).max()) > 1e-3


def test_solvers_agree_in_one_step_and_differ_in_four(tiny):
    """A first step of each is Euler's, a last one of Heun's too."""
    one, four = (
        [latents(tiny, [SHORT], [0], steps=n, solver=name) for name in ("euler", "heun", "ab2")]
        for n in (1, 4)
    )
    for other in one[1:]:
        np.testing.assert_allclose(other, one[0], rtol=0, atol=1e-6)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(four[a] - four[b]).max() > 1e-3


def test_trap_6_rounding_shows_in_the_latents(tiny):
    exact = latents(tiny, [SHORT], [0], steps=30)
    rounded = latents(tiny, [SHORT], [0], steps=30, official_rounding=True)
    assert 1e-3 < np.abs(rounded - exact).max() < 0.5


def test_image_to_image(tiny):
    """Full strength is sampling from noise; little strength stays near the image."""
    photo = Image.effect_mandelbrot((80, 64), (-2, -1, 1, 1), 20).convert("RGB")
    options = ImageOptions(steps=4)
    plain = np.concatenate(list(tiny.generate([SHORT], 1, options)))
    full = np.concatenate(list(tiny.generate([SHORT], 1, options, init_image=photo)))
    np.testing.assert_array_equal(plain, full)
    grid = replace(options, strength=0.5).grid()
    assert len(grid.dt) == 2 and grid.timesteps[0] == 500

    # A shifted grid begins elsewhere, and the image is noised to just there.
    shifted = replace(options, strength=0.5, shift=3.0)
    assert shifted.grid().timesteps[0] == pytest.approx(250)
    one_step = [
        np.concatenate(list(tiny.generate([SHORT], 1, o, init_image=photo)))
        for o in (
            ImageOptions(steps=2, strength=0.5, shift=3.0),
            ImageOptions(steps=1, strength=0.75),
        )
    ]
    np.testing.assert_array_equal(*one_step)

    # Without the model's part, half the way back is half image, half noise.
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 3)).astype(np.float32)
    x = encode_pixels(tiny.vae, tiny.params["vae"], pixels)
    z0 = initial_noise(0, np.arange(1), tiny.latent_shape)
    np.testing.assert_allclose(flow.interpolate(x, z0, 0.5), (x + z0) / 2, rtol=0, atol=1e-6)
    near, far = (
        np.concatenate(
            list(tiny.generate([SHORT], 1, replace(options, strength=s), init_image=photo))
        ).astype(float)
        for s in (0.05, 0.9)
    )
    start = encode_pixels(
        tiny.vae, tiny.params["vae"], np.asarray(photo.crop((8, 0, 72, 64)))[None] / 127.5 - 1.0
    )
    image = np.asarray(decode_latents(tiny.vae, tiny.params["vae"], start))
    image = (np.clip(image, -1, 1) + 1) * 127.5
    assert np.abs(near - image).mean() < np.abs(far - image).mean()


def test_vae_encodes_to_the_scaled_mean(tiny):
    vae = golden("golden_vae_tiny")
    got = encode_pixels(tiny.vae, tiny.params["vae"], nhwc(vae["in.image"]))
    want = nhwc(vae["mean"]) * tiny.vae.config.scaling_factor
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


def test_bfloat16_at_full_width_keeps_the_velocity():
    """Hidden 2048, two layers: relative error of the velocity below 2e-2."""
    config = JanusFlowConfig(
        language=LlamaConfig(
            vocab_size=64, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2,
            num_attention_heads=16,
        ),
        siglip=SiglipConfig(image_size=32, width=32, layers=1, heads=2),
        gen_encoder=GenEncoderConfig(input_channels=4, kernel_size=2, stride=2, padding=0),
        gen_decoder=GenDecoderConfig(out_channels=4, upsamples=1),
    )  # fmt: skip
    params = jax.jit(lambda key: init_params(JanusFlow(config), key))(jax.random.key(0))
    # Fresh GRN and beg_of_und_embed are zero; every parameter shall matter.
    params = jax.tree.map(
        lambda a: a + 0.02 * jax.random.normal(jax.random.key(1), a.shape), params
    )
    z = initial_noise(0, np.arange(1), (12, 12, 4))
    tokens, lengths = np.arange(1, 13)[None], np.array([12])

    def velocity(dtype):
        model = JanusFlow(config, Precision(param=dtype, compute=dtype))
        cast = jax.tree.map(lambda a: a.astype(dtype), params)
        end = sample_latents(
            model, cast, tokens, lengths, z, np.float32([500]), np.float32([1]), np.float32(1),
            guided=False,
        )  # fmt: skip
        assert end.dtype == jnp.float32  # the state of the ODE
        return end - z

    exact, rounded = velocity(jnp.float32), velocity(jnp.bfloat16)
    error = float(jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact))
    print(f"relative error of the velocity in bfloat16: {error:.2e}")
    assert 1e-4 < error < 2e-2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(solver="rk4"), "Unknown solver 'rk4': choose from euler, heun, ab2"),
        (dict(strength=0.0), "strength must be in"),
        (dict(guidance_interval=(0.7, 0.2)), "guidance interval"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        ImageOptions(**options)


def test_bad_prompts_are_one_sentence(tiny):
    with pytest.raises(ValueError, match="prompt is empty"):
        next(tiny.generate(["  "], 1))
    with pytest.raises(ValueError, match="16384 positions"):
        next(tiny.generate(["word " * 20000], 1))
    with pytest.raises(ValueError, match="no VAE"):
        next(replace(tiny, vae=None).generate([SHORT], 1))


def test_parts_that_do_not_fit_are_all_named(tiny):
    vae = tiny.vae.clone(config=replace(tiny.vae.config, latent_channels=8))
    processor = replace(tiny.processor, image_size=96)
    with pytest.raises(ValueError, match=r"image_size .*\(96\).*; the VAE's latent_channels \(8\)"):
        check_parts(tiny.model.config, vae, tiny.tokenizer, processor)


def test_files_of_processors_may_be_absent(tiny, tiny_ckpt):
    """Then SigLIP says what they would have."""
    _, files = checkpoints.read_metadata(tiny_ckpt)
    kept = {name: text for name, text in files.items() if "processor" not in name}
    assert len(kept) == len(files) - 2
    tokenizer, processor = read_processors(kept, tiny.model.config.siglip)
    assert processor == tiny.processor
    assert tokenizer.num_image_tokens == tiny.tokenizer.num_image_tokens != 576
    check_parts(tiny.model.config, tiny.vae, tokenizer, processor)


def test_sizes_that_the_decoder_does_not_give_back_are_drawn_at_siglips_grid(tiny):
    """As the released samplers do: 4 x 4 tokens are 8 x 8 latents, whatever the patches' size."""
    config = tiny.model.config
    odd = replace(config, siglip=replace(config.siglip, image_size=56, patch_size=14))
    with pytest.raises(ValueError, match="have 7 latents .* back 6: .* draws with 8, but"):
        latent_shape(odd, VAEConfig())
    pipeline = replace(tiny, model=tiny.model.clone(config=odd))
    options = ImageOptions(steps=2, strength=0.5)
    image = Image.new("RGB", (90, 80), "orange")
    got, want = (next(p.generate([SHORT], 1, options, 1, image)) for p in (pipeline, tiny))
    assert got.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(got, want)


def test_without_a_size_that_the_decoder_gives_back_nothing_is_drawn(tiny):
    """Such a checkpoint still answers, as the released code does."""
    config = tiny.model.config
    odd = replace(config, gen_decoder=replace(config.gen_decoder, upsamples=2))
    for shape in (latent_shape, drawn_shape):
        with pytest.raises(ValueError, match="have 8 latents .* gives back 16: .* but not draw"):
            shape(odd, VAEConfig())
