"""The training step: what moves and what stays, accumulation, guard, average."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jflow.batch import Batch
from jflow.training import objectives, optimizer
from jflow.training import state as states
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import OptimizerConfig
from jflow.training.state import EMAConfig, Guard
from jflow.training.step import gradient_norms, gradients, train_step
from tests.tiny_training import FAST, image_row, modules, params, stack, text_row

OBJECTIVE = partial(
    objectives.janusflow, seed=5, modules=modules(), config=ObjectiveConfig(repa_layer=1)
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_steps=4)
# Rows of unequal numbers of targets and images, the second half with fewer.
BATCH = Batch(
    text=stack(
        [
            text_row([(20, 5, True), (21, 7, False)], 20, 2),
            text_row([(22, 4, True)], 20, 2),
            text_row([(23, 9, False)], 20, 2),
            text_row([(24, 2, True)], 20, 2),
        ]
    ),
    images=stack(
        [
            image_row([(1, 4, False), (2, 4, True)], 22, 2),
            image_row([(3, 6, False), (4, 2, False)], 22, 2),
            image_row([(5, 5, False)], 22, 2),
            image_row([], 22, 2),
        ]
    ),
)
step = jax.jit(
    partial(train_step, objective=OBJECTIVE, ema=EMAConfig(decay=0.9, every=3)),
    static_argnames="optimizer",
    compiler_options=FAST,
)


FIRST, SECOND = jnp.int32(0), jnp.int32(1)  # mixtures


def new_state(stage=optimizer.ADAPTATION, config=OPTIMIZER):
    return states.init(params(), stage, optimizer.adamw(config))


def close(got, want, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=atol), got, want)


def equal(a, b) -> bool:
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), a, b)
    return all(jax.tree.leaves(same))


@pytest.mark.parametrize("stage", ["ADAPTATION", "PRETRAINING", "SFT"])
def test_frozen_parameters_stay_and_trainable_ones_move(stage):
    """Twenty steps; then EMA against its closed form, and the loss has come down."""
    state = new_state(getattr(optimizer, stage))
    first = jax.tree.map(np.asarray, state)
    ema, history = {k: np.float64(v) for k, v in first.params.items()}, []
    for i in range(20):
        state, metrics = step(state, BATCH, optimizer=OPTIMIZER)
        history.append(metrics)
        if (i + 1) % 3 == 0:
            n = int(state.step) // 3
            decay = min(0.9, (1 + n) / (10 + n))
            ema = {k: decay * v + (1 - decay) * np.float64(state.params[k]) for k, v in ema.items()}
    assert state.step == 20 and state.skipped == 0 and state.guard.count == 20
    assert equal(state.frozen, first.frozen)
    whole = states.parameters(state, ema=False)
    assert equal(whole["vae"], params()["vae"])
    for path, leaf in state.params.items():
        assert not np.array_equal(leaf, first.params[path]), path
    close(state.ema, ema)
    assert equal(states.parameters(state, ema=True)["repa"]["linear_1"]["bias"],
                 state.ema["repa/linear_1/bias"])  # fmt: skip
    rates = [float(m["learning_rate"][0]) for m in history]
    np.testing.assert_allclose(rates[:5], [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3], rtol=1e-6)
    for name in ("ar", "loss"):
        assert (
            history[-1][name][0] / history[-1][name][1] < history[0][name][0] / history[0][name][1]
        )
    names = {path.split("/")[1] for path in state.params if path.startswith("janusflow")}
    assert {n for n in history[0] if n.startswith("gradient_norm/")} == {
        f"gradient_norm/{name}" for name in names | {"repa"}
    }


def test_accumulated_gradients_equal_those_of_the_large_batch():
    """Also though the parts hold unequal numbers of targets and images."""
    state = new_state(optimizer.PRETRAINING)
    static = ("objective", "parts")
    compute = jax.jit(gradients, static_argnames=static, compiler_options=FAST)
    loss, sums, gradient = compute(state, BATCH, OBJECTIVE, 1)
    got_loss, got_sums, got_gradient = compute(state, BATCH, OBJECTIVE, 2)
    close(got_loss, loss)
    close(got_gradient, gradient, atol=5e-6)  # of gradients up to 2
    for name, (total, count) in sums.items():
        np.testing.assert_array_equal(got_sums[name][1], count)
        np.testing.assert_allclose(got_sums[name][0], total, rtol=1e-6, atol=1e-6)
    assert gradient.keys() == state.params.keys()
    norms = gradient_norms(gradient)
    np.testing.assert_allclose(
        np.sqrt(sum(n**2 for n in norms.values())), optax.tree.norm(gradient), rtol=1e-6
    )
    with pytest.raises(ValueError, match="accumulate=3 does not divide a batch of 4 rows"):
        jax.eval_shape(lambda: gradients(state, BATCH, OBJECTIVE, 3))


def test_non_finite_step_is_skipped_and_counted():
    state, _ = step(new_state(), BATCH, optimizer=OPTIMIZER)
    pixels = BATCH.images.pixels.copy()
    pixels[1, 0, 3, 3, 0] = np.nan
    poisoned = Batch(BATCH.text, BATCH.images.replace(pixels=pixels))
    skipped, metrics = step(state, poisoned, optimizer=OPTIMIZER)
    assert (skipped.step, skipped.skipped) == (2, 1)
    for name in ("params", "opt_state", "guard", "ema", "frozen"):
        assert equal(getattr(skipped, name), getattr(state, name)), name
    assert metrics["skipped"] == (1, 1) and metrics["skipped_in_row"] == (1, 1)
    assert metrics["learning_rate"][0] == pytest.approx(2 / 4 * 1e-3)
    for name, (total, count) in metrics.items():
        if name not in ("skipped", "skipped_in_row", "learning_rate"):
            assert np.all(np.asarray(total) == 0) and np.all(np.asarray(count) == 0), name
    twice, metrics = step(skipped, poisoned, optimizer=OPTIMIZER)
    assert (twice.skipped, twice.skipped_in_row, metrics["skipped_in_row"][0]) == (2, 2, 2)
    after, metrics = step(skipped, BATCH, optimizer=OPTIMIZER)
    assert (after.step, after.skipped) == (3, 1) and metrics["skipped"] == (0, 1)
    assert after.skipped_in_row == 0 and metrics["skipped_in_row"] == (0, 1)
    assert metrics["learning_rate"][0] == pytest.approx(2 / 4 * 1e-3)
    assert not equal(after.params, state.params)


@pytest.mark.parametrize("off, skipped", [((7, 0), 1), ((0, 7), 1), ((5, 5), 0)])
def test_a_step_six_sigma_off_is_skipped(off, skipped):
    """Its loss or its gradient, by what the guard knows of them."""
    _, metrics = step(new_state(), BATCH, optimizer=OPTIMIZER)
    level = [metrics["loss"][0], np.log(metrics["gradient_norm"][0])]
    mean = jnp.asarray(level - 0.1 * np.array(off))
    known = Guard(FIRST, jnp.int32(300), mean, jnp.full(2, 0.01))
    after, metrics = step(new_state().replace(guard=known), BATCH, optimizer=OPTIMIZER)
    assert metrics["skipped"] == (skipped, 1)
    assert equal(after.params, new_state().params) == bool(skipped)


def test_an_update_that_is_not_finite_is_skipped_too():
    """Without eps, a gradient of 0 divides 0 by 0: the loss is finite, the parameters would not be.

    The first row of the word embeddings is never looked up.
    """
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=4, eps=0.0)
    state = new_state(optimizer.PRETRAINING, config)
    after, metrics = step(state, BATCH, optimizer=config)
    assert metrics["skipped"] == (1, 1) and equal(after.params, state.params)
    assert states.is_finite(after)


@pytest.mark.parametrize("part", ["params", "ema", "opt_state", "guard"])
def test_one_number_that_is_none_is_found(part):
    state = new_state()
    assert states.is_finite(state)
    leaves, structure = jax.tree.flatten(getattr(state, part))
    which = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[which] = leaves[which].at[..., -1].set(jnp.inf)
    assert not states.is_finite(state.replace(**{part: structure.unflatten(leaves)}))


def watched(guard: Guard, losses, norms, mixture=FIRST) -> tuple[Guard, list[bool]]:
    guard, fit = jax.lax.scan(
        lambda guard, pair: states.watch(guard, *pair, mixture)[::-1],
        guard,
        (jnp.asarray(losses, jnp.float32), jnp.asarray(norms, jnp.float32)),
    )
    return guard, fit.tolist()


def known_guard() -> Guard:
    """After 300 steps of loss N(2, 0.1) and log gradient norm N(-1, 0.5)."""
    rng = np.random.default_rng(0)
    losses, norms = rng.normal(2, 0.1, 300), np.exp(rng.normal(-1, 0.5, 300))
    guard, fit = watched(Guard.new(FIRST), losses[:100], norms[:100])
    values = np.stack([losses[:100], np.log(norms[:100])])
    np.testing.assert_allclose(guard.mean, values.mean(1), rtol=1e-4)
    np.testing.assert_allclose(guard.variance, values.var(1), rtol=1e-4)
    guard, more = watched(guard, losses[100:], norms[100:])
    assert all(fit + more)
    return guard


def test_guard_refuses_six_sigma_above_and_nothing_below():
    guard = known_guard()
    mean, sigma = np.asarray(guard.mean), np.sqrt(np.asarray(guard.variance))

    def fit(loss_sigmas, norm_sigmas):
        loss, log_norm = mean + sigma * [loss_sigmas, norm_sigmas]
        norm = jnp.float32(np.exp(log_norm))
        return bool(states.watch(guard, jnp.float32(loss), norm, FIRST)[0])

    assert fit(0, 0) and fit(5.9, 5.9) and fit(-9, -9)
    assert not fit(6.1, 0) and not fit(0, 6.1)
    for bad in (np.nan, np.inf):
        for pair in ((bad, 1.0), (2.0, bad)):
            ok, after = states.watch(guard, *map(jnp.float32, pair), FIRST)
            assert not ok and equal(after, guard)


def test_guard_is_not_blinded_by_a_burst_but_follows_a_new_level():
    guard = known_guard()
    after, fit = watched(guard, [1e6], [1e6])
    assert fit == [False]
    assert np.all(after.mean - guard.mean <= 0.061 * np.sqrt(guard.variance))
    assert watched(after, [3.0], [0.4])[1] == [False]  # ten sigma are still out of line
    _, fit = watched(guard, [4.0] * 40, [0.4] * 40)  # twenty sigma, for good
    assert not fit[0] and all(fit[20:])


def test_guard_lets_everything_finite_pass_at_first():
    assert all(watched(Guard.new(FIRST), [1.0] * 50 + [100.0], [1.0] * 50 + [100.0])[1])


def test_guard_learns_every_mixture_anew():
    """Another mixture has other losses, which are no reason to skip; not even its first."""
    guard, fit = watched(known_guard(), [9.0, 100.0], [5.0, 90.0], SECOND)
    assert all(fit) and int(guard.count) == 2 and int(guard.mixture) == 1
    np.testing.assert_allclose(guard.mean[0], 54.5, rtol=1e-6)
    ok, empty = states.watch(known_guard(), jnp.float32(np.nan), jnp.float32(1), SECOND)
    assert not ok and equal(empty, Guard.new(SECOND))


def test_a_steps_mixture_is_that_of_its_batch():
    """Batches passed by on a rewind count: the next one is number step + data_offset."""
    mixed = jax.jit(
        partial(
            train_step,
            objective=lambda params, part, batch, step: (jnp.zeros(()), {}),
            optimizer=OPTIMIZER,
            ema=EMAConfig(0.9, 1),
            mixtures=(0, 5, 7),
        )
    )
    state, found = new_state().replace(data_offset=jnp.int32(3)), []
    for _ in range(6):
        state, _ = mixed(state, BATCH)
        found.append((int(state.guard.mixture), int(state.guard.count)))
    assert found == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]


def test_state_holds_frozen_parameters_once_and_masters_in_float32():
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params())
    state = states.init(half, optimizer.ADAPTATION, optimizer.adamw(OPTIMIZER))
    assert all(leaf.dtype == jnp.float32 for leaf in state.params.values())
    assert all(leaf.dtype == jnp.bfloat16 for leaf in state.frozen.values())
    assert state.ema.keys() == state.params.keys() and equal(state.ema, state.params)
    for path, leaf in state.params.items():
        assert leaf.unsafe_buffer_pointer() != state.ema[path].unsafe_buffer_pointer()


EVERY_100 = EMAConfig(decay=0.99, every=100)


def test_an_average_forgets_what_it_began_with():
    """Stage 1's 10,000 steps average 100 times; its parameters were random before."""
    ema, update = {"a": jnp.ones(())}, jax.jit(partial(states.update_ema, config=EVERY_100))
    for step in range(100, 10_001, 100):
        ema = update(ema, {"a": jnp.zeros(())}, jnp.int32(step))
    assert ema["a"] < 1e-9


def test_an_average_of_less_than_its_interval_has_learned_something():
    """Or a run of 80 steps would save what it began with."""
    ema, update = {"a": jnp.zeros(())}, jax.jit(partial(states.update_ema, config=EVERY_100))
    for step in range(1, 100):
        ema = update(ema, {"a": jnp.float32(step)}, jnp.int32(step))
        assert step - 0.2 < ema["a"] <= step
    assert update(ema, {"a": jnp.float32(1e3)}, jnp.int32(101))["a"] == ema["a"]


def test_averages_without_sense():
    for options in ({"decay": 1.0}, {"every": 0}):
        with pytest.raises(ValueError, match="ema"):
            EMAConfig(**options)
