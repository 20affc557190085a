"""Random keys that depend on what a draw is for, and on nothing else."""

import zlib

import jax


def fold(seed: int, purpose: str, *ids: int | jax.Array) -> jax.Array:
    """The key of one draw, from the run's seed, the draw's purpose and its ids (step, sample, ...).

    A result drawn with it changes neither with batch layout nor with the number of devices.
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    for i in ids:
        key = jax.random.fold_in(key, i)
    return key
