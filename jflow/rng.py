"""Random keys that depend on what a draw is for, and on nothing else."""

import zlib

import jax


def require_seed(seed: int, name: str = "seed") -> None:
    """Raises ValueError in one sentence for a seed of which JAX would take the lower bits alone."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"{name} must be from 0 to {2**32 - 1}, not {seed}.")


def fold(seed: int, purpose: str, *ids: int | jax.Array) -> jax.Array:
    """The key of one draw, from the run's seed, the draw's purpose and its ids (step, sample, ...).

    A result drawn with it changes neither with batch layout nor with the number of devices.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    for i in ids:
        key = jax.random.fold_in(key, i)
    return key
