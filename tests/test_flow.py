"""Paths, time densities, time grids and solvers against closed forms."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jflow import flow
from jflow.samplers import SOLVERS
from tests.goldens import GOLDEN

RNG = np.random.default_rng(0)


def test_path_ends_at_noise_and_image_and_its_slope_is_the_velocity():
    x, z0 = (jnp.asarray(RNG.standard_normal((3, 4, 4, 2), np.float32)) for _ in range(2))
    np.testing.assert_array_equal(flow.interpolate(x, z0, jnp.zeros(3)), z0)
    np.testing.assert_array_equal(flow.interpolate(x, z0, jnp.ones(3)), x)
    t = jnp.float32([0.1, 0.5, 0.9])
    _, slope = jax.jvp(lambda t: flow.interpolate(x, z0, t), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(slope, flow.velocity(x, z0), rtol=0, atol=1e-6)


def test_guidance():
    v_cond, v_uncond = jnp.float32([1, 2]), jnp.float32([0, 4])
    np.testing.assert_array_equal(flow.guide(v_cond, v_uncond, 1.0), v_cond)
    np.testing.assert_array_equal(flow.guide(v_cond, v_uncond, 0.0), v_uncond)
    np.testing.assert_array_equal(flow.guide(v_cond, v_uncond, 3.0), [3, -2])


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (0.7, 0.5), (-1.0, 2.0)])
def test_training_times_are_logit_normal(mean, std):
    keys = jax.random.split(jax.random.key(3), 20_000)
    t = np.asarray(jax.vmap(lambda key: flow.sample_time(key, mean, std))(keys), np.float64)
    assert t.min() > 0 and t.max() < 1

    def distance(mean, std):
        return stats.kstest(t, lambda t: stats.norm.cdf(np.log(t / (1 - t)), mean, std)).statistic

    assert distance(mean, std) < 1.63 / np.sqrt(len(t))  # the 1% level
    assert distance(mean, 1.1 * std) > 1.63 / np.sqrt(len(t))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("start", [0.0, 0.4])
def test_time_grid_covers_the_way(start, shift):
    grid = flow.time_grid(7, start, shift)
    ends = grid.timesteps / 1000 + grid.dt
    first = start / (start + shift * (1 - start))
    assert grid.timesteps[0] == pytest.approx(1000 * first, abs=1e-4)
    np.testing.assert_allclose(ends[:-1], grid.timesteps[1:] / 1000, rtol=0, atol=1e-6)
    assert ends[-1] == pytest.approx(1, abs=1e-6)
    # SD3 states the shift for time running from image to noise: s' = a s / (1 + (a - 1) s).
    s = 1 - (start + (1 - start) * np.arange(7) / 7)
    want = 1 - shift * s / (1 + (shift - 1) * s)
    np.testing.assert_allclose(grid.timesteps, 1000 * want, rtol=1e-6, atol=1e-4)


def test_trap_6_official_rounding_of_time_to_bfloat16():
    """966.67 becomes 968 and 1/30 becomes 0.03345, only when asked for."""
    manifest = json.loads((GOLDEN / "manifest.json").read_text())["bf16_schedule_30_steps"]
    rounded = flow.time_grid(30, official_rounding=True)
    np.testing.assert_array_equal(rounded.timesteps, manifest["t_as_bfloat16"])
    np.testing.assert_array_equal(rounded.dt, np.full(30, manifest["dt_as_bfloat16"], np.float32))
    exact = flow.time_grid(30)
    np.testing.assert_array_equal(exact.timesteps, np.float32(manifest["t_float"]))
    assert exact.dt.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("bad", [dict(steps=0), dict(steps=3, start=1.0), dict(steps=3, shift=0)])
def test_bad_time_grids_are_refused(bad):
    with pytest.raises(ValueError):
        flow.time_grid(**bad)


def endpoint(solver: str, steps: int, shift: float = 1.0) -> float:
    """dz/dt = -2 z + cos(3 t) from z = 1: the solver's z at t = 1, in float64."""
    grid = flow.time_grid(steps, shift=shift)
    timesteps = np.cumsum(np.r_[0, grid.dt.astype(np.float64)])[:-1] * 1000
    with jax.enable_x64():

        def velocity(z, timestep):
            return -2 * z + jnp.cos(3 * timestep / 1000)

        dt = jnp.asarray(np.diff(np.r_[timestep_ends(timesteps)]))
        return float(SOLVERS[solver](velocity, jnp.float64(1.0), jnp.asarray(timesteps), dt))


def timestep_ends(timesteps: np.ndarray) -> np.ndarray:
    return np.r_[timesteps / 1000, 1.0]


EXACT = (11 / 13) * math.exp(-2) + (2 * math.cos(3) + 3 * math.sin(3)) / 13


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("ab2", 2)])
def test_solvers_converge_with_their_order(solver, order, shift):
    """Four times the steps shrink the error 4**order-fold, also on unequal steps."""
    coarse, fine = (abs(endpoint(solver, n, shift) - EXACT) for n in (160, 640))
    assert coarse < 1e-3
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.03)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_follow_a_straight_line_exactly_and_never_ask_about_the_end(solver):
    asked = []

    def velocity(z, timestep):
        jax.debug.callback(lambda t: asked.append(float(t)), timestep)
        return jnp.full_like(z, 3.0)

    grid = flow.time_grid(5)
    z = SOLVERS[solver](
        velocity, jnp.ones((2, 3)), jnp.asarray(grid.timesteps), jnp.asarray(grid.dt)
    )
    np.testing.assert_allclose(z, 4.0, rtol=1e-6)
    assert max(asked) < 1000
    assert len(asked) == (9 if solver == "heun" else 5)
