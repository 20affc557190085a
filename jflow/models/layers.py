"""The few layers that every part of the model shares; attention is in attention.py.

Axes: B batch, T new tokens, S cached tokens, H query heads, K key/value heads, D head width,
C channels. Numbers that decide correctness (norms, softmax, rotary angles, the sinusoid) are
computed in float32 whatever `dtype` the matrix products use.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from jflow.sharding import constrain

# Weights begin as N(0, 1 / fan_in), the scale at which a product keeps the variance of its input.
fan_in_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")

# The name under which splash attention hands its results to its backward pass.
FLASH_RESIDUALS = "flash_residuals"


@dataclass(frozen=True)
class Precision:
    """Where each number lives: `param` storage, `compute` of matrix products, `norm`, `softmax`.

    `Precision()` is exact float32; `Precision(compute=jnp.bfloat16)` is what the released model
    runs in, with norms and softmax kept in float32.
    """

    param: Any = jnp.float32
    compute: Any = jnp.float32
    norm: Any = jnp.float32
    softmax: Any = jnp.float32


Remat = Literal["none", "dots", "full"]


def remat(module: type[nn.Module], policy: Remat) -> type[nn.Module]:
    """The same module, computing again in the backward pass what `policy` does not keep.

    none: keeps everything. dots: keeps the products with weights and the results of flash
    attention; the rest is cheap to compute. full: keeps the module's inputs.

    Raises ValueError for another policy.
    """
    if policy == "none":
        return module
    policies = {"dots": _keep_products, "full": None}
    if policy not in policies:
        raise ValueError(f"remat must be none, dots or full, not {policy!r}.")
    return nn.remat(module, prevent_cse=False, policy=policies[policy])


def _keep_products(primitive, *args, **params) -> bool:
    """A policy of jax.checkpoint: what is kept, by the operation that made it."""
    dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return (
        dots(primitive, *args, **params)
        or params.get("name") == FLASH_RESIDUALS  # splash attention's
        or "dot_product_attention_fwd" in primitive.name  # cuDNN's
    )


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis (LlamaRMSNorm); [..., C] -> [..., C]."""

    epsilon: float
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.precision.param)
        y = x.astype(self.precision.norm)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale).astype(self.precision.compute)


class LayerNorm(nn.Module):
    """(x - mean) / std * scale + bias over the last axis; [..., C] -> [..., C]."""

    epsilon: float
    precision: Precision

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.precision.param)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.precision.param)
        y = x.astype(self.precision.norm)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * scale + bias).astype(self.precision.compute)


class Linear(nn.Module):
    """x @ kernel + bias; [..., I] -> [..., features].

    Parameters may hold `rows` [features, I] instead of `kernel` [I, features], see `by_rows`.
    """

    features: int
    precision: Precision
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.precision.compute
        shape = (x.shape[-1], self.features)
        if self.has_variable("params", "rows"):
            y = _product_with_rows(x.astype(dtype), self.get_variable("params", "rows"))
        else:
            kernel = self.param("kernel", fan_in_init, shape, self.precision.param)
            y = _product(x.astype(dtype), kernel.astype(dtype))
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, shape[1:], self.precision.param)
            y = y + bias.astype(dtype)
        return y


def platform() -> str:
    """Where the program at hand will run: on the mesh in use, which may be of other machines."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, [..., C] and [C, D]."""
    if x.size == x.shape[-1] and platform() in ("gpu", "cuda"):
        # Of one vector XLA would write out all terms of the sums, as large as the kernel; of eight
        # it makes a product for the matrix units, which have so many rows at least.
        rows = jnp.pad(x.reshape(1, -1), ((0, 7), (0, 0)))
        return (rows @ kernel)[0].reshape(*x.shape[:-1], -1)
    return x @ kernel


def _product_with_rows(x: jax.Array, rows: jax.Array) -> jax.Array:
    """x @ rows.T, [..., C] and [D, C]."""
    if x.size > x.shape[-1]:
        return x @ rows.astype(x.dtype).T
    terms = x.reshape(-1).astype(jnp.float32) * rows.astype(jnp.float32)
    return jnp.sum(terms, axis=1).astype(x.dtype).reshape(*x.shape[:-1], -1)


def by_rows(params: dict) -> dict:
    """The same parameters, each Linear's `kernel` [I, features] turned into `rows` [features, I].

    With one vector a GPU sums along each row as it lies: what makes the vector, the sums of several
    such products and what follows become one kernel, which reads the weights at the speed of the
    memory. A library's product reads 2048 columns with a quarter of the chip, and wants the vector
    padded before.

    Each array is let go as soon as it is turned; the tree passed in is changed.
    """
    if "kernel" in params:
        params["rows"] = params.pop("kernel").T
    for part in params.values():
        if isinstance(part, dict):
            by_rows(part)
    return params


def _rounded_power(base: float, exponents: np.ndarray) -> np.ndarray:
    """The float32 nearest to each power, as torch gives it; the exponents are float32."""
    exact = np.float64(base) ** exponents.astype(np.float32).astype(np.float64)
    return exact.astype(np.float32)


def rotary_angles(positions: jax.Array, width: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, width / 2] of the angles by which `rotary_embedding` rotates.

    Args:
      positions: [B, T] integers.
      width: of a head, even.
      theta: base of the geometric series of wavelengths.

    Angles are float32: bfloat16 cannot even hold the integer 257.
    """
    half = width // 2
    # Not by the compiler, whose powers are an ulp off: far positions multiply it.
    frequencies = np.float32(1) / _rounded_power(theta, np.arange(half) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotary_embedding(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the two halves of each head by position (Hugging Face's half-split RoPE).

    x: [B, T, H, D] queries or keys; cos, sin: see `rotary_angles`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


@flax.struct.dataclass
class KVCache:
    """Keys and values of S tokens that lie before the present ones.

    k: [layers, B, K, D, S], v: [layers, B, K, S, D], or without layers inside one layer; in these
      layouts both products of attention read them as they lie (on a CPU, decoding is 1.4 times
      as fast as with S before K).
    segment_ids: [B, S]; a token sees a cached one when their segments are equal, so 0 hides an
      empty or padded slot from every real token.
    slot: int32, where the next token will stand; the slots from there on are empty.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    slot: jax.Array

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, segment_ids: jax.Array, reserve: int = 0) -> "KVCache":
        """A cache of T tokens, k and v [layers, B, T, K, D], and `reserve` empty slots behind."""
        k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, reserve), (0, 0), (0, 0))) for a in (k, v))
        k, v = rearrange(k, "l B S K D -> l B K D S"), rearrange(v, "l B S K D -> l B K S D")
        return cls(
            k=constrain(k, None, "batch", "heads", None, None),
            v=constrain(v, None, "batch", "heads", None, None),
            segment_ids=jnp.pad(segment_ids, ((0, 0), (0, reserve))),
            slot=jnp.asarray(segment_ids.shape[1], jnp.int32),
        )

    def write(self, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> "KVCache":
        """T more tokens, k and v [layers, B, T, K, D], in the slots from `slot` on."""
        new, put = KVCache.of(k, v, segment_ids), jax.lax.dynamic_update_slice_in_dim
        return KVCache(
            k=put(self.k, new.k, self.slot, axis=4),
            v=put(self.v, new.v, self.slot, axis=3),
            segment_ids=put(self.segment_ids, new.segment_ids, self.slot, axis=1),
            slot=self.slot + new.slot,
        )


@flax.struct.dataclass
class Prefix:
    """Keys and values of S tokens that all that is computed continues; read only.

    k, v: [layers, B, S, K, D] as the model makes them, or without layers inside one layer: beside
      hundreds of new tokens they are joined with theirs.
    segment_ids: [B, S], as of `KVCache`; the tokens that new ones see lie right before them.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array

    @classmethod
    def of(cls, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> "Prefix":
        k, v = (constrain(a, None, "batch", None, "heads", None) for a in (k, v))
        return cls(k, v, segment_ids)


def sinusoidal_embedding(timesteps: jax.Array, dim: int) -> jax.Array:
    """[B] timesteps in [0, 1000] -> [B, dim] float32, cosines before sines.

    diffusers' Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0), as uvit.py uses it.
    """
    half = dim // 2
    exponents = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = _rounded_power(math.e, exponents)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    embedding = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def put(x: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    """x with `values` at `places` of each row; places beyond its end are dropped.

    [B, L, D], [B, P], [B, P, D] -> [B, L, D]. Row by row, not with an index of rows: only so does
    the partitioner know that rows on different devices have nothing to say to each other.
    """
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(x, places, values)


def take(x: jax.Array, places: jax.Array) -> jax.Array:
    """What stands at `places` of each row, 0 beyond its end: [B, L, D], [B, P] -> [B, P, D]."""
    return jax.vmap(lambda row, at: row.at[at].get(mode="fill", fill_value=0))(x, places)


def _windows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x with zeros around it, as far as the kernel reaches."""
    kh, kw, _ = kernel.shape
    return jnp.pad(x, ((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2), (0, 0)))


def depthwise_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Depthwise convolution with odd kernels and zero padding; [B, H, W, C], [kh, kw, C]."""
    reach = (size // 2 for size in kernel.shape[:2])
    small = all(side <= 1 + far for side, far in zip(x.shape[1:3], reach, strict=True))
    return _product_of_all(x, kernel) if small else _sum_of_shifted(x, kernel)


def _product_of_all(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Where a kernel reaches from every position to all others: a matrix for each channel.

    On a map of 4x4x96 3 times as fast as the sum on a CPU, and a few kernels instead of a loop of
    49 on a GPU.
    """
    (height, width), (top, left) = x.shape[1:3], (size // 2 for size in kernel.shape[:2])
    # What (u, v) becomes takes from (i, j) the tap (i - u, j - v) from the kernel's middle.
    taps = jnp.stack([kernel[top - u : top - u + height] for u in range(height)])
    taps = jnp.stack([taps[:, :, left - v : left - v + width] for v in range(width)])
    return jnp.einsum("bijc,vuijc->buvc", x, taps)


@jax.custom_vjp
def _sum_of_shifted(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Shifted products, which compilers fuse into one pass, while XLA's grouped convolution took
    14 times as long on a CPU (24x24x1536, 7x7). Its derivative is written out too: differentiating
    the sum took 3 times as long, and minutes to compile.
    """
    kh, kw, _ = kernel.shape
    height, width = x.shape[1:3]
    padded = _windows(x, kernel)
    return sum(
        padded[:, i : i + height, j : j + width] * kernel[i, j]
        for i in range(kh)
        for j in range(kw)
    )


def _sum_of_shifted_forward(x, kernel):
    return _sum_of_shifted(x, kernel), (x, kernel)


def _sum_of_shifted_backward(saved, gradient):
    x, kernel = saved
    kh, kw, _ = kernel.shape
    padded = _windows(x, kernel)

    def tap(i):
        window = jax.lax.dynamic_slice(padded, (0, i // kw, i % kw, 0), x.shape)
        return jnp.sum(window * gradient, axis=(1, 2), dtype=jnp.float32)

    # Samples are summed after the loop: devices that share the batch then meet once, not 49 times.
    taps = jax.lax.map(tap, jnp.arange(kh * kw)).sum(1).reshape(kernel.shape)
    return _sum_of_shifted(gradient, kernel[::-1, ::-1]), taps.astype(kernel.dtype)


_sum_of_shifted.defvjp(_sum_of_shifted_forward, _sum_of_shifted_backward)
