"""train.py with a model that costs nothing, for tests of what is around it.

python -m tests.processes ARGUMENTS OF train.py. A step takes at least $PAUSE seconds; of batches
with a sample of $BAD, "4,5", the loss is no number.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp

import train


def quadratic(params, batch, whole, step, *, seed, modules, config):
    """Its minimum moves with the samples of the batch; "ids" and "tokens" tell which these are."""
    there = whole.images.sample_ids >= 0  # Meshes differ in how many rows they leave empty.
    ids = jnp.where(there, whole.images.sample_ids, 0)
    minimum = jnp.sum(ids) / jnp.sum(there) / 100
    loss = sum(jnp.mean(jnp.square(x - minimum)) for x in jax.tree.leaves(params["janusflow"]))
    bad = jnp.array([int(i) for i in os.environ.get("BAD", "-1").split(",")])
    loss = jnp.where(jnp.any(jnp.isin(whole.images.sample_ids, bad) & there), jnp.nan, loss)
    one = jnp.ones(())
    told = {"ids": jnp.sum(ids**2), "tokens": jnp.sum(whole.text.tokens)}
    return loss, {"rf": (loss, one)} | {k: (v.astype(jnp.float32), one) for k, v in told.items()}


def slowly(batch, mesh, place=train.place_batch):
    time.sleep(float(os.environ.get("PAUSE", 0)))
    return place(batch, mesh)


def begin(*args, make=train.begin):
    """Says which part of the state this process has."""
    now = make(*args)
    leaves = jax.tree.leaves(now)
    held = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    print(f"holds {held / sum(leaf.nbytes for leaf in leaves):.3f} of the state", flush=True)
    return now


if __name__ == "__main__":
    train.janusflow, train.place_batch, train.begin = quadratic, slowly, begin
    sys.exit(train.main())
