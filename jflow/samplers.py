"""Solvers of dz/dt = v(z, t) from noise to image, each one `lax.scan` over a time grid.

`velocity(z, timestep)` takes z [B, h, w, c] float32 and the scalar 1000 t, and returns z's shape.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def euler(velocity: Velocity, z: jax.Array, timesteps: jax.Array, dt: jax.Array) -> jax.Array:
    """z += v dt, the released sampler; one evaluation a step, first order."""

    def step(z, now):
        timestep, h = now
        return z + h * velocity(z, timestep), None

    return jax.lax.scan(step, z, (timesteps, dt))[0]


def heun(velocity: Velocity, z: jax.Array, timesteps: jax.Array, dt: jax.Array) -> jax.Array:
    """The mean of the velocities at both ends of a step; two evaluations a step, second order.

    The last step is Euler's (which keeps the order): the model is never asked about t = 1.
    """

    def step(z, now):
        timestep, next_timestep, h = now
        v = velocity(z, timestep)
        return z + h / 2 * (v + velocity(z + h * v, next_timestep)), None

    z, _ = jax.lax.scan(step, z, (timesteps[:-1], timesteps[1:], dt[:-1]))
    return z + dt[-1] * velocity(z, timesteps[-1])


def adams_bashforth(
    velocity: Velocity, z: jax.Array, timesteps: jax.Array, dt: jax.Array
) -> jax.Array:
    """Extrapolates from the velocity before; one evaluation a step, second order.

    The two-step Adams-Bashforth method for unequal steps; its first step is Euler's.
    """

    def step(carry, now):
        z, v_before, h_before = carry
        timestep, h = now
        v = velocity(z, timestep)
        slope = jnp.where(h_before > 0, (v - v_before) / jnp.maximum(h_before, 1e-12), 0)
        return (z + h * (v + h / 2 * slope), v, h), None

    return jax.lax.scan(step, (z, jnp.zeros_like(z), jnp.zeros_like(dt[0])), (timesteps, dt))[0][0]


SOLVERS = {"euler": euler, "heun": heun, "ab2": adams_bashforth}
