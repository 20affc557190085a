"""The generation encoder and decoder: ConvNeXt blocks around the language model.

uvit.py of the released code (ShallowUViTEncoder, ShallowUViTDecoder), in NHWC.
"""

from dataclasses import dataclass, fields

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from jflow.models.layers import (
    Linear,
    Precision,
    RMSNorm,
    depthwise_conv,
    fan_in_init,
    sinusoidal_embedding,
)


def _from_hf(cls, params: dict):
    """The config's own fields out of the released `params`; refuses what changes the network."""
    if params.get("dropout", 0.0):
        raise ValueError("Dropout in the generation encoder and decoder is not supported.")
    names = {field.name for field in fields(cls)}
    known = {name: value for name, value in params.items() if name in names}
    return cls(**{n: tuple(v) if isinstance(v, list) else v for n, v in known.items()})


@dataclass(frozen=True)
class GenEncoderConfig:
    """Fields and defaults of ShallowUViTEncoder."""

    input_channels: int = 3
    kernel_size: int = 7
    stride: int = 4
    padding: int | None = None  # None: kernel_size - stride
    block_out_channels: tuple[int, ...] = (768,)
    layers_in_middle: int = 2
    hidden_size: int = 2048
    norm_eps: float = 1e-6
    use_bias: bool = True
    use_mid_block: bool = True

    @property
    def channels(self) -> int:
        return self.block_out_channels[-1]

    def tokens_along(self, latent_size: int) -> int:
        """How many tokens stand for `latent_size` latents along one side."""
        padding = self.kernel_size - self.stride if self.padding is None else self.padding
        return (latent_size + 2 * padding - self.kernel_size) // self.stride + 1

    @classmethod
    def from_hf(cls, params: dict) -> "GenEncoderConfig":
        config = _from_hf(cls, params)
        if len(set(config.block_out_channels)) > 1:
            raise ValueError(
                f"block_out_channels {config.block_out_channels} of the generation encoder must "
                f"all be equal."
            )
        return config


@dataclass(frozen=True)
class GenDecoderConfig:
    """Fields and defaults of ShallowUViTDecoder; `upsamples` doublings lead back to the latent."""

    in_channels: int = 768
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (768,)
    upsamples: int = 2
    layers_in_middle: int = 2
    hidden_size: int = 2048
    norm_eps: float = 1e-6
    use_bias: bool = True
    use_mid_block: bool = True

    @classmethod
    def from_hf(cls, params: dict) -> "GenDecoderConfig":
        return _from_hf(cls, params)


class GlobalResponseNorm(nn.Module):
    """bias + (weight * nx + 1) * x, nx the norm over space relative to its mean over channels.

    ConvNeXt V2; [B, H, W, C] -> [B, H, W, C].
    """

    precision: Precision

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1],)
        weight = self.param("weight", nn.initializers.zeros, shape, self.precision.param)
        bias = self.param("bias", nn.initializers.zeros, shape, self.precision.param)
        y = x.astype(self.precision.norm)
        square = jnp.sum(jnp.square(y), axis=(1, 2), keepdims=True)
        # The slope of a root at 0 is infinite; like torch's norm, ours is flat there.
        gx = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        nx = gx / (jnp.mean(gx, axis=-1, keepdims=True) + 1e-6)
        return (bias + (weight * nx + 1) * y).astype(x.dtype)


class ConvNeXtBlock(nn.Module):
    """7x7 depthwise, MLP with GRN, residual, then FiLM on the sum by the time embedding."""

    hidden_size: int
    norm_eps: float
    use_bias: bool
    precision: Precision

    @nn.compact
    def __call__(self, x, t_emb):
        """x: [B, H, W, C]; t_emb: [B, hidden_size] -> [B, H, W, C]."""
        precision, channels = self.precision, x.shape[-1]

        def linear(features, name):
            return Linear(features, precision, self.use_bias, name=name)

        kernel = self.param(
            "depthwise_kernel", nn.initializers.normal(1 / 7), (7, 7, channels), precision.param
        )
        y = depthwise_conv(x, kernel.astype(x.dtype))
        if self.use_bias:
            bias = self.param("depthwise_bias", nn.initializers.zeros, (channels,), precision.param)
            y = y + bias.astype(x.dtype)
        y = RMSNorm(self.norm_eps, precision, name="norm")(y)
        y = nn.gelu(linear(4 * channels, "channelwise_linear_1")(y), approximate=False)
        y = GlobalResponseNorm(precision, name="channelwise_norm")(y)
        x = x + linear(channels, "channelwise_linear_2")(y)
        film = linear(2 * channels, "cond_embeds_mapper")(nn.silu(t_emb))
        scale, shift = jnp.split(film[:, None, None, :], 2, axis=-1)
        return x * (1 + scale) + shift


class MidBlock(nn.Module):
    """`num_layers` ConvNeXt blocks in a row."""

    num_layers: int
    hidden_size: int
    norm_eps: float
    use_bias: bool
    precision: Precision

    @nn.compact
    def __call__(self, x, t_emb):
        for i in range(self.num_layers):
            x = ConvNeXtBlock(
                self.hidden_size,
                self.norm_eps,
                self.use_bias,
                self.precision,
                name=f"res_blocks_{i}",
            )(x, t_emb)
        return x


class GenEncoder(nn.Module):
    """Noisy latents and time to a token grid and the time embedding."""

    config: GenEncoderConfig
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, z: jax.Array, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """
        Args:
          z: [B, H, W, c] noisy latents.
          timesteps: [B] 1000 t, in [0, 1000].

        Returns: grid [B, h, w, C], which is also the decoder's skip, and t_emb [B, hidden_size].
        """
        config, precision = self.config, self.precision

        def linear(name):
            return Linear(config.hidden_size, precision, config.use_bias, name=name)

        t_emb = sinusoidal_embedding(timesteps, config.block_out_channels[0])
        t_emb = linear("time_embed_linear_2")(nn.silu(linear("time_embed_linear_1")(t_emb)))

        k, s = config.kernel_size, config.stride
        padding = k - s if config.padding is None else config.padding
        kernel = self.param(
            "in_conv_kernel",
            fan_in_init,
            (k, k, config.input_channels, config.channels),
            precision.param,
        )
        bias = self.param(
            "in_conv_bias", nn.initializers.zeros, (config.channels,), precision.param
        )
        dtype = precision.compute
        x = jax.lax.conv_general_dilated(
            z.astype(dtype),
            kernel.astype(dtype),
            (s, s),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ) + bias.astype(dtype)
        if config.use_mid_block:
            x = MidBlock(
                config.layers_in_middle,
                config.hidden_size,
                config.norm_eps,
                config.use_bias,
                precision,
                name="mid_block",
            )(x, t_emb)
        return x, t_emb


class Unpatchify(nn.Module):
    """RMSNorm, 1x1 convolution, pixel shuffle by 2; [B, h, w, C] -> [B, 2h, 2w, out_channels]."""

    out_channels: int
    norm_eps: float
    use_bias: bool
    precision: Precision

    @nn.compact
    def __call__(self, x):
        x = RMSNorm(self.norm_eps, self.precision, name="norm")(x)
        x = Linear(4 * self.out_channels, self.precision, self.use_bias, name="unpatch_conv")(x)
        return rearrange(x, "B h w (c p q) -> B (h p) (w q) c", p=2, q=2)


class GenDecoder(nn.Module):
    """The language model's grid, the encoder's skip and the time embedding to a velocity."""

    config: GenDecoderConfig
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array, t_emb: jax.Array) -> jax.Array:
        """
        Args:
          x: [B, h, w, in_channels] from the language model; normalised here, the skip is not.
          skip: [B, h, w, C] the encoder's output; it goes behind x along the channels.
          t_emb: [B, hidden_size].

        Returns: [B, H, W, out_channels].
        """
        config, precision = self.config, self.precision
        x = RMSNorm(config.norm_eps, precision, name="input_norm")(x)
        x = jnp.concatenate([x, skip], axis=-1)
        if config.use_mid_block:
            x = MidBlock(
                config.layers_in_middle,
                config.hidden_size,
                config.norm_eps,
                config.use_bias,
                precision,
                name="mid_block",
            )(x, t_emb)
        for i in range(config.upsamples):
            last = i == config.upsamples - 1
            channels = config.out_channels if last else config.block_out_channels[-1]
            x = Unpatchify(
                channels, config.norm_eps, config.use_bias, precision, name=f"out_convs_{i}"
            )(x)
        return x
