"""Sums of many steps to the numbers that a person reads."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

from jflow.batch import Batch
from jflow.data.pipeline import BatchStats
from jflow.training.flops import Cost, Work, count_work
from jflow.training.objectives import Sums


@jax.jit
def add_up(total: Sums, step: Sums) -> Sums:
    """A total with one more step. A name that is new begins with it: where the mixture changes, a
    task may join.

    Added where they are, so that a line of the log fetches as much as one step has, and not the
    small arrays of hundreds of steps.
    """
    joined = {
        name: jax.tree.map(jnp.add, total[name], pair) if name in total else pair
        for name, pair in step.items()
    }
    return total | joined


def means(total: Sums) -> dict[str, float]:
    """name -> mean over the steps of a total; arrays (bins) become name/0, name/1, ...; what
    counted nothing is left out."""
    found = {}
    for name, (value, count) in sorted(jax.device_get(total).items()):
        for i, (v, n) in enumerate(zip(np.ravel(value), np.ravel(count), strict=True)):
            if n:
                found[name if np.ndim(value) == 0 else f"{name}/{i}"] = float(v / n)
    return found


class Meter:
    """Adds up steps, and what the time went to, between two lines of the log.

    Args: cost: of the model's step; peak: operations per second of all devices together; shares:
      how many equal ones of a batch `add` is given one of.
    """

    def __init__(self, cost: Cost, peak: float, shares: int = 1):
        self._cost, self._peak, self._shares = cost, peak, shares
        self.clear()

    def clear(self) -> None:
        """Forgets the steps since the last `read`, as a rewind does."""
        self._total: Sums = {}
        self._stats: list[BatchStats] = []
        self._work = np.zeros(len(Work._fields))
        self._spent: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self, cause: str) -> Iterator[None]:
        """Counts the block's time as share_waiting_for_CAUSE."""
        began = time.perf_counter()
        yield
        self._spent[cause] = self._spent.get(cause, 0.0) + time.perf_counter() - began

    def add(self, sums: Sums, batch: Batch, stats: BatchStats) -> None:
        """A step. batch: a share of its rows, numpy arrays; the others are taken to do as much."""
        self._total = add_up(self._total, sums)
        self._stats.append(stats)
        self._work += np.array(count_work(batch)) * self._shares

    def read(self) -> dict[str, float]:
        """The `means` since the last call, speeds and shares of time and, of this process's
        samples, how many did not fit; begins anew.

        Waits for the last step to be computed.
        """
        values = means(self._total)
        seconds = time.perf_counter() - self._began
        work, steps = Work(*self._work), len(self._stats)
        flops = self._cost.of(work) / seconds
        values |= {
            "padding": sum(stats.padding for stats in self._stats) / steps,
            "left_out": sum(stats.left_out for stats in self._stats)
            / max(1, sum(stats.samples for stats in self._stats)),
            "broken_records": sum(len(stats.broken) for stats in self._stats),
            "seconds_per_step": seconds / steps,
            "tokens_per_second": work.tokens / seconds,
            "images_per_second": (work.understood + work.generated) / seconds,
            "tflops_per_second": flops / 1e12,
            "mfu": flops / self._peak,
        }
        values |= {f"share_waiting_for_{name}": s / seconds for name, s in self._spent.items()}
        self.clear()
        return values
