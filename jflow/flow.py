"""Rectified flow: straight lines from noise (t = 0) to images (t = 1).  Paper sections 3.1, 3.3."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np


def interpolate(x: jax.Array, z0: jax.Array, t: jax.Array) -> jax.Array:
    """z_t = t x + (1 - t) z0.

    Args: x images and z0 noise, [B, h, w, c]; t in [0, 1], [B] or a scalar.
    """
    t = jnp.reshape(t, jnp.shape(t) + (1,) * (x.ndim - jnp.ndim(t)))
    return t * x + (1 - t) * z0


def velocity(x: jax.Array, z0: jax.Array) -> jax.Array:
    """The constant velocity dz_t/dt = x - z0 of the line, the regression target (eq. 7)."""
    return x - z0


def sample_time(key: jax.Array, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """A logit-normal t in (0, 1), sigmoid of N(mean, std^2): what training draws (section 3.3).

    The paper follows SD3 and prints no numbers; 0 and 1 are SD3's best (arXiv 2403.03206).
    """
    return jax.nn.sigmoid(mean + std * jax.random.normal(key))


def guide(v_cond: jax.Array, v_uncond: jax.Array, guidance_scale: jax.Array) -> jax.Array:
    """Classifier-free guidance, v = w v_cond - (w - 1) v_uncond (eq. 5)."""
    return guidance_scale * v_cond - (guidance_scale - 1) * v_uncond


@dataclass(frozen=True)
class TimeGrid:
    """The steps of an ODE solver over t, float32 [N] each.

    timesteps: 1000 t at the beginning of each step, what the encoder is fed. They are rounded once
      from float64: 1000 times a float32 t would be off by 6e-5, which the sinusoid shows.
    dt: the step's length in t.
    """

    timesteps: np.ndarray
    dt: np.ndarray


def time_grid(
    steps: int, start: float = 0.0, shift: float = 1.0, official_rounding: bool = False
) -> TimeGrid:
    """N steps from t = start to t = 1, uniform before the shift.

    Args:
      steps: N >= 1.
      start: in [0, 1), where image-to-image begins.
      shift: a > 0 of SD3's timestep shift, in our direction t' = t / (t + a (1 - t)); more than 1
        spends more steps near the noise.
      official_rounding: round 1000 t and dt to bfloat16, as the released sampler does unnoticed
        (966.67 becomes 968, and the thirty steps of 1/30 sum to 1.0034).

    Raises ValueError for values outside these ranges.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}.")
    if not 0 <= start < 1:
        raise ValueError(f"Sampling must start at a time in [0, 1), not {start}.")
    if shift <= 0:
        raise ValueError(f"The timestep shift must be positive, not {shift}.")
    t = start + (1 - start) * np.arange(steps + 1) / steps
    t = t / (t + shift * (1 - t))
    timesteps, dt = t[:-1] * 1000, np.diff(t)
    if official_rounding:
        timesteps, dt = timesteps.astype(ml_dtypes.bfloat16), dt.astype(ml_dtypes.bfloat16)
    return TimeGrid(timesteps.astype(np.float32), dt.astype(np.float32))
