"""One step of training: gradients of the trainable parameters, guard, update, average."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from jflow.batch import Batch
from jflow.training.objectives import Sums
from jflow.training.optimizer import OptimizerConfig, adamw, learning_rate, merge
from jflow.training.state import EMAConfig, TrainState, update_ema, watch

# (params, batch, whole batch, step) -> (loss, sums); see objectives.janusflow.
Objective = Callable[[dict, Batch, Batch, jax.Array], tuple[jax.Array, Sums]]


def gradients(
    state: TrainState, batch: Batch, objective: Objective, parts: int
) -> tuple[jax.Array, Sums, dict]:
    """Loss, sums and gradient of a batch whose rows are computed in `parts`, one after another.

    Raises ValueError where the rows do not divide.
    """

    def loss(params, part):
        return objective(merge(params, state.frozen), part, batch, state.step)

    compute = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        (value, sums), gradient = compute(state.params, batch)
        return value, sums, gradient
    for rows in (len(leaf) for leaf in jax.tree.leaves(batch)):
        if rows % parts:
            raise ValueError(f"accumulate={parts} does not divide a batch of {rows} rows.")

    def add(total, part):
        return jax.tree.map(jnp.add, total, compute(state.params, part)), None

    # Each part takes every `parts`-th row, so a batch sharded over its rows stays where it is.
    split = jax.tree.map(lambda a: rearrange(a, "(B n) ... -> n B ...", n=parts), batch)
    shapes = jax.eval_shape(compute, state.params, jax.tree.map(lambda a: a[0], split))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    ((value, sums), gradient), _ = jax.lax.scan(add, zeros, split)
    return value, sums, gradient


def gradient_norms(gradient: dict) -> dict[str, jax.Array]:
    """The norm of each module's gradient: "language_model", ..., and "repa"."""
    modules: dict[str, list] = {}
    for path, leaf in gradient.items():
        part, name = path.split("/")[:2]
        modules.setdefault(name if part == "janusflow" else part, []).append(leaf)
    return {name: optax.tree.norm(leaves) for name, leaves in modules.items()}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: OptimizerConfig,
    ema: EMAConfig,
    mixtures: tuple[int, ...] = (0,),
) -> tuple[TrainState, Sums]:
    """One batch, seen; the state before is not used again, so jit may be given its buffers.

    mixtures: the batches of the data from which on each of its mixtures holds.

    A step whose loss, gradient or update is not finite, or out of line (`state.watch`), changes
    neither parameters nor moments nor averages, and is counted in `skipped`.

    Returns: the new state, and name -> (sum, count), to be added up over steps and divided:
      the objective's sums, "loss", "gradient_norm", "gradient_norm/MODULE", "learning_rate",
      "skipped" and "skipped_in_row". Of a skipped step only the last three count.
    """
    loss, sums, gradient = gradients(state, batch, objective, optimizer.accumulate)
    norm = optax.tree.norm(gradient)
    updates, opt_state = adamw(optimizer).update(gradient, state.opt_state, state.params)
    mixture = jnp.sum(state.step + state.data_offset >= jnp.array(mixtures), dtype=jnp.int32) - 1
    fit, guard = watch(state.guard, loss, norm, mixture)
    fit &= jnp.isfinite(optax.tree.norm(updates))

    def keep(new, old):
        return jax.tree.map(lambda a, b: jnp.where(fit, a, b), new, old)

    params = keep(optax.apply_updates(state.params, updates), state.params)
    step = state.step + 1
    new = state.replace(
        step=step,
        skipped=state.skipped + ~fit,
        skipped_in_row=jnp.where(fit, 0, state.skipped_in_row + 1),
        params=params,
        ema=update_ema(state.ema, params, step, ema, fit),
        opt_state=keep(opt_state, state.opt_state),
        guard=guard,
    )

    one = jnp.ones(())
    norms = {f"gradient_norm/{name}": (n, one) for name, n in gradient_norms(gradient).items()}
    metrics = sums | {"loss": (loss, one), "gradient_norm": (norm, one)} | norms
    metrics = keep(metrics, jax.tree.map(jnp.zeros_like, metrics))
    rate = learning_rate(optimizer, state.step - state.skipped)
    return new, metrics | {
        "learning_rate": (rate, one),
        "skipped": ((~fit).astype(jnp.float32), one),
        # Not the state's own array, whose buffer the next step is given.
        "skipped_in_row": (new.skipped_in_row.astype(jnp.float32), one),
    }
