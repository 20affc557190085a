"""The SDXL variational autoencoder (diffusers' AutoencoderKL): pixels to latents and back.

Axes: B batch, H and W pixels, h and w latent cells, C channels. Parameter names are those of
diffusers, with `.0.` written `_0/`. Source: paper section 3.1 (stabilityai/sdxl-vae, frozen).
"""

from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from jflow.models.attention import attention
from jflow.models.layers import Linear, Precision, fan_in_init


@dataclass(frozen=True)
class VAEConfig:
    """Fields of diffusers' AutoencoderKL, with the values of stabilityai/sdxl-vae as defaults.

    latents of JanusFlow = scaling_factor * mean of the posterior.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025

    def __post_init__(self):
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"VAE block_out_channels {self.block_out_channels} must be multiples of "
                    f"norm_num_groups {self.norm_num_groups}."
                )

    @property
    def downscale(self) -> int:
        """Pixels along one side of a latent cell."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_hf(cls, config: dict) -> "VAEConfig":
        """Reads diffusers' config.json; raises ValueError for what this autoencoder cannot express.

        Every field must be there: diffusers' own defaults are not those of SDXL.
        """
        given = {name: v for name, v in config.items() if not name.startswith("_")}
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in given]
        if missing:
            raise ValueError(f"The VAE's config.json lacks {', '.join(missing)}; add it.")
        required = _fixed_fields(len(given["block_out_channels"]))
        harmless = ("sample_size", "force_upcast")
        for name, value in given.items():
            # A shift of 0 is none.
            if name in names or name in harmless or (name == "shift_factor" and value == 0):
                continue
            needed = required.get(name)
            if (list(value) if isinstance(value, tuple) else value) != needed:
                raise ValueError(
                    f"VAE config {name} = {value!r} is not supported; jflow's autoencoder needs "
                    f"{needed!r}."
                )
        values = {name: given[name] for name in names}
        return cls(**values | {"block_out_channels": tuple(given["block_out_channels"])})

    def to_hf(self) -> dict:
        """The config.json that `from_hf` and diffusers read back to this autoencoder."""
        channels = list(self.block_out_channels)
        known = vars(self) | {"block_out_channels": channels, "_class_name": "AutoencoderKL"}
        return known | _fixed_fields(len(channels))


def latent_side(image_size: int, vae: VAEConfig | None) -> int:
    """Latents along a side of an image of so many pixels, which are its latents without a VAE."""
    return image_size // (vae.downscale if vae else 1)


def _fixed_fields(blocks: int) -> dict:
    """What diffusers' config.json says of an autoencoder like SDXL's beside VAEConfig's fields."""
    return {
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "mid_block_add_attention": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }


def conv(features: int, size: int, precision: Precision, name: str) -> nn.Conv:
    """A convolution of stride 1 that keeps height and width; `size` is odd."""
    return nn.Conv(
        features,
        (size, size),
        padding=size // 2,
        dtype=precision.compute,
        param_dtype=precision.param,
        name=name,
    )


def group_mean(x: jax.Array, groups: int) -> jax.Array:
    """The mean of each group of channels over all pixels; [B, H, W, C] -> [B, 1, 1, C].

    Pixels first, then channels: over all three axes at once XLA's CPU reduction is half as fast.
    """
    mean = rearrange(jnp.mean(x, axis=(1, 2)), "B (G c) -> B G c", G=groups).mean(axis=-1)
    return repeat(mean, "B G -> B 1 1 (G c)", c=x.shape[-1] // groups)


class GroupNorm(nn.Module):
    """Normalises each group of channels over all pixels, epsilon 1e-6; [B, H, W, C] -> same.

    Two passes in precision.norm: E[x^2] - E[x]^2 loses digits where the mean is large.
    """

    groups: int
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.precision.param)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.precision.param)
        x = x.astype(self.precision.norm)
        x = x - group_mean(x, self.groups)
        x = x * (jax.lax.rsqrt(group_mean(jnp.square(x), self.groups) + 1e-6) * scale)
        return (x + bias).astype(self.precision.compute)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))); [B, H, W, I] -> [B, H, W, features]."""

    features: int
    groups: int
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.silu(GroupNorm(self.groups, self.precision, name="norm1")(x))
        y = conv(self.features, 3, self.precision, "conv1")(y)
        y = nn.silu(GroupNorm(self.groups, self.precision, name="norm2")(y))
        y = conv(self.features, 3, self.precision, "conv2")(y)
        if x.shape[-1] != self.features:
            x = conv(self.features, 1, self.precision, "conv_shortcut")(x)
        return x + y


class Attention(nn.Module):
    """Every cell attends to every other, one head as wide as the channels; [B, h, w, C] -> same."""

    groups: int
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        y = GroupNorm(self.groups, self.precision, name="group_norm")(x)
        y = rearrange(y, "B h w C -> B (h w) 1 C")
        q, k, v = (Linear(channels, self.precision, name=f"to_{n}")(y) for n in "qkv")
        y = attention(q, k, v, self.precision)
        y = Linear(channels, self.precision, name="to_out_0")(y)
        return x + rearrange(y, "B (h w) 1 C -> B h w C", h=height, w=width)


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the lowest resolution; [B, h, w, C] -> same."""

    groups: int
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResnetBlock(x.shape[-1], self.groups, self.precision, name="resnets_0")(x)
        x = Attention(self.groups, self.precision, name="attentions_0")(x)
        return ResnetBlock(x.shape[-1], self.groups, self.precision, name="resnets_1")(x)


class Downsample(nn.Module):
    """Halves height and width; the padding is on the lower right only, as in diffusers."""

    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Conv(
            x.shape[-1],
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),
            dtype=self.precision.compute,
            param_dtype=self.precision.param,
            name="conv",
        )(x)


# How a 3x3 kernel's taps fall on the undoubled pixels: [first or second of a pair, pixel, tap].
PAIR_TAPS = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)


class DoubledConv(nn.Module):
    """Doubles height and width by repeating pixels, then a 3x3 convolution; [B, H, W, C].

    A 3x3 window over repeated pixels holds only 2x2 different ones, so the four pixels that come
    of one are four 2x2 convolutions, done as one at the low resolution: 4/9 of the operations,
    half the time on a CPU.
    """

    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, height, width, channels = x.shape
        dtype, shape = self.precision.compute, (3, 3, channels, channels)
        kernel = self.param("kernel", fan_in_init, shape, self.precision.param)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.precision.param)
        kernel = jnp.einsum(
            "api,bqj,ijco->pqcabo", PAIR_TAPS, PAIR_TAPS, kernel, precision="highest"
        )
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            rearrange(kernel, "p q c a b o -> p q c (a b o)").astype(dtype),
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = rearrange(y, "B H W (a b o) -> a b B H W o", a=2, b=2)
        y = jnp.stack([y[a, b, :, a : a + height, b : b + width] for a in (0, 1) for b in (0, 1)])
        return rearrange(y, "(a b) B H W o -> B (H a) (W b) o", a=2) + bias.astype(dtype)


class Upsample(nn.Module):
    """Doubles height and width."""

    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return DoubledConv(self.precision, name="conv")(x)


class Level(nn.Module):
    """Resnets at one resolution, then "down" or "up" to the next; None stays."""

    features: int
    layers: int
    groups: int
    resample: str | None
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = ResnetBlock(self.features, self.groups, self.precision, name=f"resnets_{i}")(x)
        if self.resample == "down":
            x = Downsample(self.precision, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample(self.precision, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """[B, H, W, 3] -> [B, h, w, 2 * latent_channels], mean and log-variance before quant_conv."""

    config: VAEConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, groups = self.config, self.config.norm_num_groups
        last = len(c.block_out_channels) - 1
        x = conv(c.block_out_channels[0], 3, self.precision, "conv_in")(x)
        for i, features in enumerate(c.block_out_channels):
            resample = None if i == last else "down"
            level = (features, c.layers_per_block, groups, resample, self.precision)
            x = Level(*level, name=f"down_blocks_{i}")(x)
        x = MidBlock(groups, self.precision, name="mid_block")(x)
        x = nn.silu(GroupNorm(groups, self.precision, name="conv_norm_out")(x))
        return conv(2 * c.latent_channels, 3, self.precision, "conv_out")(x)


class Decoder(nn.Module):
    """[B, h, w, latent_channels] after post_quant_conv -> [B, H, W, 3]."""

    config: VAEConfig
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, groups = self.config, self.config.norm_num_groups
        last = len(c.block_out_channels) - 1
        x = conv(c.block_out_channels[-1], 3, self.precision, "conv_in")(x)
        x = MidBlock(groups, self.precision, name="mid_block")(x)
        for i, features in enumerate(reversed(c.block_out_channels)):
            resample = None if i == last else "up"
            level = (features, c.layers_per_block + 1, groups, resample, self.precision)
            x = Level(*level, name=f"up_blocks_{i}")(x)
        x = nn.silu(GroupNorm(groups, self.precision, name="conv_norm_out")(x))
        return conv(c.out_channels, 3, self.precision, "conv_out")(x)


class AutoencoderKL(nn.Module):
    """The whole autoencoder; `dtype` is that of convolutions and products, norms are float32.

    Raises ValueError for float16, in which the SDXL weights overflow (design.md, trap 7).
    """

    config: VAEConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        if jnp.dtype(self.dtype) == jnp.float16:
            raise ValueError("The SDXL VAE overflows in float16; use bfloat16 or float32.")
        super().__post_init__()

    def setup(self):
        precision = Precision(param=self.param_dtype, compute=self.dtype)
        latent = self.config.latent_channels
        self.encoder = Encoder(self.config, precision)
        self.decoder = Decoder(self.config, precision)
        self.quant_conv = conv(2 * latent, 1, precision, "quant_conv")
        self.post_quant_conv = conv(latent, 1, precision, "post_quant_conv")

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The posterior of pixels [B, H, W, 3] in [-1, 1]: mean and log-variance, [B, h, w, C].

        The mean is not multiplied by scaling_factor; the log-variance is cut to [-30, 20]. Rows
        and columns of pixels that fill no whole latent cell are dropped. Both are of type `dtype`.
        """
        moments = self.quant_conv(self.encoder(pixels))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [B, h, w, C], already divided by scaling_factor, to pixels [B, H, W, 3].

        Pixels are near [-1, 1] but not clipped, and of type `dtype`.
        """
        return self.decoder(self.post_quant_conv(latents))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Decodes the mean of the posterior; touches every parameter, for init."""
        mean, _ = self.encode(pixels)
        return self.decode(mean)
