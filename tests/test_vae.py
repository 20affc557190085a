"""The autoencoder against diffusers' own: stored goldens, and live at random configs."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Reference
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from jflow.convert.vae_rules import LEGACY_VAE_NAMES, VAE_RULES
from jflow.models.layers import Precision
from jflow.models.vae import AutoencoderKL, GroupNorm, VAEConfig
from tests.goldens import ATOL, GOLDEN, golden, nhwc


def find(key: str) -> tuple[str, str]:
    """Our path and the einops pattern of one diffusers key; exactly one rule must fit."""
    found = []
    for rule in VAE_RULES:
        hf = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(rule.hf))
        if match := re.fullmatch(hf, key):
            found.append((rule.path.format(**match.groupdict()), rule.pattern))
    assert len(found) == 1, f"{key}: {found}"
    return found[0]


def to_params(state: dict[str, np.ndarray]) -> dict:
    """A diffusers state dict as our tree, by the rules alone (not by the conversion engine)."""
    flat = {}
    for key, array in state.items():
        for old, new in LEGACY_VAE_NAMES:
            key = key.replace(old, new)
        path, pattern = find(key)
        flat[path] = rearrange(array, pattern)
    return unflatten_dict(flat, sep="/")


def run(model: AutoencoderKL, params: dict, method: str, x: np.ndarray):
    return jax.jit(lambda p, y: model.apply({"params": p}, y, method=method))(params, x)


def nchw(array) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(np.array(array), -1, -3).copy())


def reference(channels, layers, groups, seed, latent=4) -> Reference:
    """diffusers' model with random weights, also where a fresh one has zeros and ones."""
    levels = len(channels)
    model = Reference(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=channels,
        layers_per_block=layers,
        norm_num_groups=groups,
        latent_channels=latent,
        scaling_factor=0.2,
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_(noise / np.sqrt(p[0].numel()))
            else:
                p.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model


def state_of(model: Reference) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def tiny():
    config = json.loads((GOLDEN / "vae_tiny" / "config.json").read_text())
    state = load_file(GOLDEN / "vae_tiny" / "diffusion_pytorch_model.safetensors")
    return VAEConfig.from_hf(config), state


def test_goldens(tiny):
    config, state = tiny
    model, params, g = AutoencoderKL(config), to_params(state), golden("golden_vae_tiny")
    mean, logvar = run(model, params, "encode", nhwc(g["in.image"]))
    np.testing.assert_allclose(mean, nhwc(g["mean"]), rtol=0, atol=ATOL)
    np.testing.assert_allclose(logvar, nhwc(g["logvar"]), rtol=0, atol=ATOL)
    for latent, decoded in (("in.latent", "decoded"), ("in.latent_rect", "decoded_rect")):
        pixels = run(model, params, "decode", nhwc(g[latent]))
        np.testing.assert_allclose(pixels, nhwc(g[decoded]), rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "channels, layers, groups, size, latent",
    [
        ((16, 32, 32, 64), 2, 8, (64, 48), 4),
        ((8, 24), 1, 4, (14, 22), 3),
        ((32, 16, 48), 3, 16, (24, 40), 4),
        ((24,), 1, 1, (6, 9), 2),
        ((8, 16, 16), 2, 2, (27, 37), 5),  # not a multiple of the downscale: rows are dropped
    ],
)
def test_agrees_with_diffusers(channels, layers, groups, size, latent):
    theirs = reference(channels, layers, groups, seed=sum(channels) + layers, latent=latent)
    config = VAEConfig.from_hf(dict(theirs.config))
    model, params = AutoencoderKL(config), to_params(state_of(theirs))
    pixels = np.random.default_rng(layers).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    with torch.no_grad():
        posterior = theirs.encode(nchw(pixels)).latent_dist
        decoded = theirs.decode(posterior.mean).sample.numpy()
    mean, logvar = run(model, params, "encode", pixels)
    pixels_again = run(model, params, "decode", nhwc(posterior.mean.numpy()))
    whole = run(model, params, "__call__", pixels)
    assert config.downscale == 2 ** (len(channels) - 1)
    assert mean.shape[1:3] == tuple(side // config.downscale for side in size)
    for ours, expected in (
        (mean, posterior.mean.numpy()),
        (logvar, posterior.logvar.numpy()),
        (pixels_again, decoded),
        (whole, decoded),
    ):
        atol = ATOL * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(ours, nhwc(expected), rtol=0, atol=atol)


def test_full_size_keys_and_shapes():
    """The tree of the default config is that of stabilityai/sdxl-vae, nothing missing or extra."""
    published = json.loads((GOLDEN / "keys_sdxl_vae.json").read_text())
    config = VAEConfig.from_hf(published["config"])
    pixels = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    tree = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), pixels)["params"]
    ours = {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}
    # Arrays of one repeated zero have a shape but no memory.
    state = {k: np.broadcast_to(np.float32(0), shape) for k, shape in published["keys"].items()}
    theirs = {path: x.shape for path, x in flatten_dict(to_params(state), sep="/").items()}
    assert config == VAEConfig()
    assert len(theirs) == 248
    assert ours == theirs
    assert sum(np.prod(shape, dtype=int) for shape in ours.values()) == published["n_params"]


def test_legacy_attention_names_are_accepted(tiny):
    _, state = tiny
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, array in state.items():
        for new_name, old_name in names.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        old[key] = array
    assert len(old.keys() - state.keys()) == 16
    jax.tree.map(np.testing.assert_array_equal, to_params(old), to_params(state))


def relative_error(x, exact) -> float:
    x, exact = np.asarray(x, np.float64), np.asarray(exact, np.float64)
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


def test_bfloat16_is_as_close_to_float32_as_diffusers(tiny):
    """Relative errors of 2% are bfloat16's own (3 digits, 30 layers): diffusers makes them too."""
    config, state = tiny
    params, g = to_params(state), golden("golden_vae_tiny")
    model = AutoencoderKL(config, dtype=jnp.bfloat16)
    pixels = run(model, params, "decode", nhwc(g["in.latent"]))
    mean, logvar = run(model, params, "encode", nhwc(g["in.image"]))
    assert pixels.dtype == mean.dtype == logvar.dtype == jnp.bfloat16

    theirs = Reference.from_pretrained(GOLDEN / "vae_tiny", torch_dtype=torch.bfloat16)
    with torch.no_grad():
        posterior = theirs.encode(torch.from_numpy(g["in.image"]).bfloat16()).latent_dist
        decoded = theirs.decode(torch.from_numpy(g["in.latent"]).bfloat16()).sample
    for name, ours, reference_value in (
        ("mean", mean, posterior.mean),
        ("logvar", logvar, posterior.logvar),
        ("decoded", pixels, decoded),
    ):
        error = relative_error(ours, nhwc(g[name]))
        assert error < 0.03
        assert error < 1.25 * relative_error(reference_value.float(), g[name])


def test_trap_7_float16_is_refused_and_bfloat16_survives_what_overflows_it(tiny):
    config, state = tiny
    with pytest.raises(ValueError, match="overflows in float16; use bfloat16 or float32"):
        AutoencoderKL(config, dtype=jnp.float16)
    large = state | {"decoder.conv_in.weight": 1e6 * state["decoder.conv_in.weight"]}
    latents = nhwc(golden("golden_vae_tiny")["in.latent"])
    exact = run(AutoencoderKL(config), to_params(large), "decode", latents)
    ours = run(AutoencoderKL(config, dtype=jnp.bfloat16), to_params(large), "decode", latents)
    assert relative_error(ours, exact) < 0.02


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-4), (jnp.bfloat16, 4e-3)])
def test_group_norm_is_float32_inside(dtype, tolerance):
    """A mean of 100 standard deviations: sums in bfloat16, or E[x^2] - E[x]^2, would be far off."""
    x = 100 + np.random.default_rng(0).standard_normal((2, 16, 16, 8))
    x = np.asarray(jnp.asarray(x, dtype))
    norm = GroupNorm(2, Precision(compute=dtype))
    y = norm.apply({"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}, x)
    exact = torch.nn.functional.group_norm(nchw(x.astype(np.float64)), 2, eps=1e-6).numpy()
    assert y.dtype == dtype
    assert relative_error(y, nhwc(exact)) < tolerance


def test_log_variance_is_cut(tiny):
    config, state = tiny
    channels, side = config.latent_channels, config.downscale
    signs = (-1.0) ** np.arange(1, channels + 1)
    bias = np.concatenate([np.zeros(channels), 500 * signs]).astype(np.float32)
    params = to_params(state | {"quant_conv.bias": bias})
    pixels = np.zeros((1, side, side, 3), np.float32)
    _, logvar = run(AutoencoderKL(config), params, "encode", pixels)
    np.testing.assert_array_equal(logvar[0, 0, 0], np.where(signs < 0, -30, 20))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": "gelu"}, "act_fn = 'gelu' is not supported"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "up_block_types"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention = False"),
        ({"use_quant_conv": False}, "use_quant_conv = False"),
        ({"use_post_quant_conv": False}, "use_post_quant_conv = False"),
        ({"shift_factor": 0.1}, "shift_factor = 0.1"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"norm_num_groups": 48}, "must be multiples of norm_num_groups 48"),
    ],
)
def test_refuses_what_it_cannot_express(change, message):
    published = json.loads((GOLDEN / "keys_sdxl_vae.json").read_text())["config"]
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_hf(published | change)


def test_a_shift_of_zero_is_none():
    published = json.loads((GOLDEN / "keys_sdxl_vae.json").read_text())["config"]
    assert VAEConfig.from_hf(published | {"shift_factor": 0.0}) == VAEConfig()


def test_refuses_a_config_that_leaves_a_field_open():
    published = json.loads((GOLDEN / "keys_sdxl_vae.json").read_text())["config"]
    del published["scaling_factor"]
    with pytest.raises(ValueError, match="lacks scaling_factor"):
        VAEConfig.from_hf(published)
