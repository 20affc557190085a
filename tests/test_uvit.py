"""ConvNeXt blocks and the time embedding against diffusers' own, at random sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.uvit_2d import ConvNextBlock
from einops import rearrange

from jflow.models.layers import Precision, depthwise_conv, sinusoidal_embedding
from jflow.models.uvit import (
    ConvNeXtBlock,
    GenDecoder,
    GenDecoderConfig,
    GenEncoder,
    GenEncoderConfig,
    GlobalResponseNorm,
)


def convnext(channels: int, hidden: int, use_bias: bool) -> ConvNextBlock:
    """diffusers' block with the released model's kernel (its own is 3x3)."""
    block = ConvNextBlock(channels, 1e-6, True, use_bias, 0.0, hidden).eval()
    block.depthwise = torch.nn.Conv2d(channels, channels, 7, 1, 3, 1, channels, use_bias)
    return block


def randomize(module: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn_like(p)
            scale = p[0].numel() ** -0.5 if p.ndim == 2 or "depthwise.weight" in name else 0.3
            p.copy_(scale * noise + (name == "norm.weight"))
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def linear(state: dict, name: str) -> dict:
    ours = {"kernel": state[f"{name}.weight"].T}
    return ours | ({"bias": state[f"{name}.bias"]} if f"{name}.bias" in state else {})


def block_params(state: dict) -> dict:
    params = {
        "depthwise_kernel": rearrange(state["depthwise.weight"], "c 1 h w -> h w c"),
        "norm": {"scale": state["norm.weight"]},
        "channelwise_norm": {
            "weight": state["channelwise_norm.gamma"].reshape(-1),
            "bias": state["channelwise_norm.beta"].reshape(-1),
        },
    }
    if "depthwise.bias" in state:
        params["depthwise_bias"] = state["depthwise.bias"]
    names = ("channelwise_linear_1", "channelwise_linear_2", "cond_embeds_mapper")
    return params | {name: linear(state, name) for name in names}


@pytest.mark.parametrize("seed", range(6))
def test_convnext_block_equals_diffusers(seed):
    rng = np.random.default_rng(seed)
    channels, hidden, height, width = (int(n) for n in rng.integers(3, 12, 4))
    use_bias = bool(seed % 2)
    block = convnext(channels, hidden, use_bias)
    params = block_params(randomize(block, seed))
    x = rng.standard_normal((2, height, width, channels), np.float32)
    cond = rng.standard_normal((2, hidden), np.float32)
    with torch.no_grad():
        want = block(torch.tensor(np.moveaxis(x, -1, 1)), torch.tensor(cond)).numpy()
    got = ConvNeXtBlock(hidden, 1e-6, use_bias, Precision()).apply({"params": params}, x, cond)
    np.testing.assert_allclose(got, np.moveaxis(want, 1, -1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dim", [32, 33, 768])
def test_sinusoid_equals_diffusers(dim):
    timesteps = np.float32([0, 33.333332, 500, 966.6667, 999.5])
    want = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)(torch.tensor(timesteps))
    # Angles reach 1000, where neighbouring float32 are 6e-5 apart.
    np.testing.assert_allclose(
        sinusoidal_embedding(timesteps, dim), want.numpy(), rtol=0, atol=1.3e-4
    )


@pytest.mark.parametrize("size", [(6, 9), (4, 4), (4, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 7)])
def test_depthwise_convolution_and_its_gradients(shape, size):
    """Also where the kernel reaches from every position to all others."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *size, 4), np.float32)
    kernel = rng.standard_normal((*shape, 4), np.float32)
    image = torch.tensor(np.moveaxis(x, -1, 1), requires_grad=True)
    weight = torch.tensor(rearrange(kernel, "h w c -> c 1 h w"), requires_grad=True)
    want = torch.nn.functional.conv2d(image, weight, padding="same", groups=4)
    torch.sum(want**2).backward()
    got = depthwise_conv(x, kernel)
    np.testing.assert_allclose(got, np.moveaxis(want.detach().numpy(), 1, -1), rtol=0, atol=2e-5)
    dx, dk = jax.grad(lambda x, k: jnp.sum(depthwise_conv(x, k) ** 2), (0, 1))(x, kernel)
    np.testing.assert_allclose(dx, np.moveaxis(image.grad.numpy(), 1, -1), rtol=1e-5, atol=2e-4)
    want = rearrange(weight.grad.numpy(), "c 1 h w -> h w c")
    np.testing.assert_allclose(dk, want, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("kernel, stride, padding", [(2, 2, 0), (4, 4, 0), (3, 2, 1), (5, 2, None)])
def test_encoder_without_blocks_is_its_convolution(kernel, stride, padding):
    """Any patch geometry of the released config; the token grid is as long as announced."""
    config = GenEncoderConfig(
        input_channels=4, kernel_size=kernel, stride=stride, padding=padding,
        block_out_channels=(6,), hidden_size=10, use_mid_block=False,
    )  # fmt: skip
    rng = np.random.default_rng(kernel)
    weight = rng.standard_normal((kernel, kernel, 4, 6), np.float32)
    embed = TimestepEmbedding(6, 10)
    state = randomize(embed, 0)
    params = {
        "in_conv_kernel": weight,
        "in_conv_bias": rng.standard_normal(6, np.float32),
        "time_embed_linear_1": linear(state, "linear_1"),
        "time_embed_linear_2": linear(state, "linear_2"),
    }
    z = rng.standard_normal((2, 13, 13, 4), np.float32)
    timesteps = np.float32([1.5, 20])
    grid, t_emb = GenEncoder(config).apply({"params": params}, z, timesteps)
    with torch.no_grad():
        want = torch.nn.functional.conv2d(
            torch.tensor(np.moveaxis(z, -1, 1)),
            torch.tensor(rearrange(weight, "h w i o -> o i h w")),
            torch.tensor(params["in_conv_bias"]),
            stride,
            kernel - stride if padding is None else padding,
        ).numpy()
        want_t = embed(Timesteps(6, True, 0)(torch.tensor(timesteps))).numpy()
    np.testing.assert_allclose(grid, np.moveaxis(want, 1, -1), rtol=0, atol=2e-5)
    np.testing.assert_allclose(t_emb, want_t, rtol=0, atol=2e-5)
    assert grid.shape[1] == grid.shape[2] == config.tokens_along(13)


@pytest.mark.parametrize("upsamples", [1, 2, 3])
def test_decoder_doubles_as_often_as_it_is_told(upsamples):
    """The last stage is norm, linear, torch's pixel shuffle."""
    config = GenDecoderConfig(
        in_channels=5, out_channels=4, block_out_channels=(3,), upsamples=upsamples,
        hidden_size=10, use_mid_block=False,
    )  # fmt: skip
    rng = np.random.default_rng(upsamples)
    x, skip = (rng.standard_normal((2, 2, 3, c), np.float32) for c in (5, 3))
    t_emb = rng.standard_normal((2, 10), np.float32)

    params = {"input_norm": {"scale": 1 + rng.standard_normal(5, np.float32)}}
    y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * params["input_norm"]["scale"]
    y = np.concatenate([y, skip], -1)
    for i in range(upsamples):
        out = 4 if i == upsamples - 1 else 3
        weight = rng.standard_normal((y.shape[-1], 4 * out), np.float32)
        bias = rng.standard_normal(4 * out, np.float32)
        scale = 1 + rng.standard_normal(y.shape[-1], np.float32)
        params[f"out_convs_{i}"] = {
            "norm": {"scale": scale},
            "unpatch_conv": {"kernel": weight, "bias": bias},
        }
        y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + 1e-6) * scale
        y = torch.tensor(np.moveaxis(y @ weight + bias, -1, 1))
        y = np.moveaxis(torch.nn.functional.pixel_shuffle(y, 2).numpy(), 1, -1)
    got = GenDecoder(config).apply({"params": params}, x, skip, t_emb)
    assert got.shape == (2, 2 * 2**upsamples, 3 * 2**upsamples, 4)
    np.testing.assert_allclose(got, y, rtol=2e-5, atol=2e-5)


def test_only_the_last_channels_count_in_a_decoder():
    params = {"block_out_channels": [5, 3], "upsamples": 2}
    decoder = GenDecoderConfig.from_hf(params | {"in_channels": 4, "hidden_size": 6})
    x, skip, t_emb = jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 6))
    init = GenDecoder(decoder).init
    tree = jax.eval_shape(init, jax.random.key(0), x, skip, t_emb)["params"]
    assert tree["out_convs_0"]["unpatch_conv"]["kernel"].shape == (7, 4 * 3)
    with pytest.raises(ValueError, match=r"\(5, 3\) of the generation encoder must all be equal"):
        GenEncoderConfig.from_hf(params)


def test_a_channel_of_zeros_has_a_finite_gradient():
    """GELU underflows to 0; torch's gradient there is 0, not NaN."""
    x = np.random.default_rng(0).standard_normal((1, 3, 3, 4), np.float32)
    x[..., 1] = 0
    params = {"weight": np.full(4, 0.7, np.float32), "bias": np.full(4, 0.1, np.float32)}
    norm = GlobalResponseNorm(Precision())
    got = jax.grad(lambda x: jnp.sum(norm.apply({"params": params}, x) ** 2))(x)

    image = torch.tensor(x, requires_grad=True)
    gx = torch.norm(image, p=2, dim=(1, 2), keepdim=True)
    nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
    torch.sum((0.1 + (0.7 * nx + 1) * image) ** 2).backward()
    np.testing.assert_allclose(got, image.grad.numpy(), rtol=1e-5, atol=2e-5)


def test_bfloat16_norms_stay_in_float32():
    """A bf16 block is off by the rounding of its products, not by that of GRN's sums."""
    rng = np.random.default_rng(0)
    params = block_params(randomize(convnext(64, 32, True), 0))
    x = rng.standard_normal((2, 24, 24, 64), np.float32)
    cond = rng.standard_normal((2, 32), np.float32)
    exact, rounded = (
        ConvNeXtBlock(32, 1e-6, True, Precision(compute=dtype)).apply(
            {"params": params}, x.astype(dtype), cond.astype(dtype)
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    error = jnp.linalg.norm(rounded.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert error < 1e-2
