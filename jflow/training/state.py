"""Everything that one training step hands to the next."""

from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jflow.training.optimizer import merge, split


@dataclass(frozen=True)
class EMAConfig:
    """Paper: ratio 0.99, no interval; SD3 has 0.99 every 100 steps, the likelier reading."""

    decay: float = 0.99
    every: int = 100

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay must be in [0, 1), not {self.decay}.")
        if self.every < 1:
            raise ValueError(f"ema.every must be at least 1, not {self.every}.")


@flax.struct.dataclass
class Guard:
    """Running level of loss and log gradient norm, each [2], over `count` finite steps of the
    mixture with this number."""

    mixture: jax.Array
    count: jax.Array
    mean: jax.Array
    variance: jax.Array

    @classmethod
    def new(cls, mixture: jax.Array) -> "Guard":
        """Of a mixture (an int32 array []) of which nothing is known yet."""
        return cls(mixture, jnp.zeros((), jnp.int32), jnp.zeros(2), jnp.zeros(2))


@flax.struct.dataclass
class TrainState:
    """step: batches seen, int32. skipped: how many of them changed nothing; skipped_in_row: how
    many of the last ones, without a break. data_offset: batches that were passed by, so that the
    next one is number step + data_offset of the data. All int32.

    params: flat {path: float32}, the trainable ones; ema: their average, of the same paths.
    frozen: flat {path: array}, all others, shared by both. opt_state: of `params`. guard: what
    tells a normal step from one to skip.
    """

    step: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    data_offset: jax.Array
    params: dict
    frozen: dict
    ema: dict
    opt_state: optax.OptState
    guard: Guard


def init(
    params: dict, trainable: tuple[str, ...], optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; run it under jit to have it sharded.

    Args:
      params: nested {"janusflow", "vae", "repa"}; those trained become float32, the others keep
        their dtype.
      trainable: see `optimizer.split`.
    """
    masters, frozen = split(params, trainable)
    masters = {path: leaf.astype(jnp.float32) for path, leaf in masters.items()}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
        data_offset=jnp.zeros((), jnp.int32),
        params=masters,
        frozen=frozen,
        # A copy, because a step that gives its state away may not give the same buffer twice.
        ema=jax.tree.map(jnp.copy, masters),
        opt_state=optimizer.init(masters),
        guard=Guard.new(jnp.zeros((), jnp.int32)),
    )


def parameters(state: TrainState, ema: bool) -> dict:
    """The whole nested tree, with the averaged or the raw trainable parameters."""
    return merge(state.ema if ema else state.params, state.frozen)


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Is everything that training has changed a number? A bool array []."""
    changed = jax.tree.leaves((state.params, state.ema, state.opt_state, state.guard))
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in changed]))


def update_ema(
    ema: dict, params: dict, step: jax.Array, config: EMAConfig, fit: jax.Array | bool = True
) -> dict:
    """decay * ema + (1 - decay) * params, at each `every`-th step, and at all before the first.

    The n-th of these has (1 + n) / (10 + n) for a larger decay: stage 1 has but 100 of them, whose
    average would be a third of what parameters were at random. Before them n is 0, and the average
    keeps up with the parameters: a short run has learned something too.

    Args:
      step: how many batches the params have seen, this one included.
      fit: whether they were changed by it; the average of a skipped step stays as it is.
    """
    n = step // config.every
    decay = jnp.minimum(config.decay, (1 + n) / (10 + n))

    def average(old, new):
        return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)

    due = (step % config.every == 0) | (step < config.every)
    return jax.lax.cond(due & fit, average, lambda old, new: old, ema, params)


def watch(
    guard: Guard, loss: jax.Array, gradient_norm: jax.Array, mixture: jax.Array
) -> tuple[jax.Array, Guard]:
    """Is this step fit to be taken? And the guard that has seen it.

    Unfit is what is not finite or, once the guard knows 100 steps, lies 6 standard deviations
    above the running mean of the last 100. A value beyond that counts as if it lay right there:
    one burst does not blind the guard, but a lasting change of level widens it and is accepted
    after some skipped steps. Another mixture, which may have other losses, is learned anew.
    """
    known, sigmas = 100, 6.0
    same = guard.mixture == mixture
    guard = jax.tree.map(lambda a, b: jnp.where(same, a, b), guard, Guard.new(mixture))
    values = jnp.stack([loss, jnp.log(jnp.maximum(gradient_norm, 1e-30))])
    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    reach = jnp.where(guard.count >= known, sigmas * jnp.sqrt(guard.variance), jnp.inf)
    fit = finite & jnp.all(values <= guard.mean + reach)

    rate = jnp.maximum(1 / (guard.count + 1), 1 / known)
    change = jnp.clip(values - guard.mean, -reach, reach)
    seen = Guard(
        mixture=mixture,
        count=guard.count + 1,
        mean=guard.mean + rate * change,
        variance=(1 - rate) * (guard.variance + rate * jnp.square(change)),
    )
    return fit, jax.tree.map(lambda new, old: jnp.where(finite, new, old), seen, guard)
