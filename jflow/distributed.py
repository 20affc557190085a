"""The processes of one run: how they find each other, agree, and end together.

Every process runs the same program on its own devices; the arrays are global. What only one of
them can know - a broken file, a notice to stop - it tells the others here. JAX ends all of them
LOST_SECONDS after one has vanished, wherever they wait for it: then the same command, with as many
processes as there are, continues from the last checkpoint.
"""

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src import distributed, xla_bridge  # JAX has no public barrier that spares the devices.
from jax.experimental import multihost_utils

# How long a process tries to reach the others at the start.
CONNECT_SECONDS = 300
# The exit status of a process that tried so in vain: EX_UNAVAILABLE. It may be no mistake, but a
# machine that is away; scripts/until_done.sh tries on.
MISSING = 69
# How long the others go on without a sign of life from a process.
LOST_SECONDS = 60
# How long a process that has failed waits to see whether all have.
FAILED_SECONDS = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `start`: --coordinator, --processes, --process."""
    group = parser.add_argument_group(
        "processes",
        "TPU slices, SLURM and Open MPI are found without these flags; so are Kubernetes jobs on "
        "TPUs and, where the package kubernetes is installed, on others.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="a free port of process 0's host")
    group.add_argument("--processes", type=int, metavar="N", help="how many; 1 looks for no others")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0 on")


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    seconds: int = CONNECT_SECONDS,
) -> None:
    """Connects this process with the others of its run, before JAX is used for anything.

    Without arguments they are those of the cluster that JAX finds itself in, if any. A program
    that has computed something already, and one that is given processes=1, stays alone.

    Args:
      coordinator: "host:port" of process 0. seconds: to wait for the others.

    Raises ValueError in one sentence for arguments that say too little, and ConnectionError where
    a cluster does not say who the others are. When these have not come after `seconds`, it ends the
    program with exit status MISSING and a sentence.
    """
    given = (coordinator, processes, process)
    if processes == 1:
        return
    if given == (None, None, None):
        if xla_bridge.backends_are_initialized():
            return
    elif None in given or not 0 <= process < processes:
        raise ValueError(
            "Several processes need --coordinator HOST:PORT, --processes N and --process I, "
            "with I from 0 to N - 1: give all three or none."
        )
    others = f"{processes} processes, at {coordinator}," if coordinator else "processes"
    try:
        with _at_most(
            seconds,
            f"The {others} of this run did not all connect within {seconds} seconds: start each of "
            f"them, with an address of process 0 that all can reach.",
        ):
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                cluster_detection_method="deactivate" if coordinator else None,
                initialization_timeout=2 * seconds,
                heartbeat_timeout_seconds=LOST_SECONDS,
            )
    except ValueError as error:
        if "coordinator_address" not in str(error):  # Else there is no cluster.
            raise
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ConnectionError(
            f"The processes of this run cannot be found ({reason}): give --coordinator, "
            f"--processes and --process, or --processes 1."
        ) from error


@contextmanager
def _at_most(seconds: float, sentence: str) -> Iterator[None]:
    """Ends the program as MISSING, with a sentence, when the block takes longer; JAX has but a
    stack trace."""

    def end():
        print(sentence, file=sys.stderr, flush=True)
        os._exit(MISSING)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_first() -> bool:
    """Is this the process that prints, logs and tidies up?"""
    return jax.process_index() == 0


def gather_texts(text: str) -> list[str]:
    """Every process's text, on every process; all of them must call it, in their main thread."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(data), np.int32))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(data)] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(rows, lengths, strict=True)]


def by_first(work: Callable[[], Any]) -> Any:
    """What `work` gives on process 0, which alone does it, or its OSError, on every process.

    Args: work: gives what JSON can hold.
    """
    if jax.process_count() == 1:
        return work()
    found = {}
    if is_first():
        try:
            found = {"value": work()}
        except OSError as error:
            found = {"error": str(error)}
    found = json.loads(gather_texts(json.dumps(found))[0])
    if "error" in found:
        raise OSError(found["error"])
    return found["value"]


def fetch(x: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on every process; all of them must call it."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def wait_for_all(name: str, seconds: float) -> None:
    """Returns once every process has called it with this name, of which each is good for once.

    It uses no device, and so may wait in a thread beside the training. Raises
    jax.errors.JaxRuntimeError when the time is over.
    """
    if jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(name, int(1000 * seconds))


class StopNotice:
    """Has one of the machines been told to stop (SIGTERM)? Asked once a step, on every process.

    All of them get the same answer at the same step.
    """

    def __init__(self):
        self._asked, self._steps = False, 0
        if jax.process_count() == 1:  # Else JAX listens for it.
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_):
        self._asked = True

    def __call__(self) -> bool:
        self._steps += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._steps)
        return self._asked


@contextmanager
def failing_together() -> Iterator[None]:
    """Lets an error pass that all processes have met.

    A process that fails alone says why and ends at once, with exit status 2: it would wait for the
    others, which wait for it, and notice only by its end.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        try:
            wait_for_all("failed", FAILED_SECONDS)
        except jax.errors.JaxRuntimeError:
            known = isinstance(error, (ValueError, OSError))
            print(f"Process {jax.process_index()} ends:", file=sys.stderr)
            traceback.print_exception(error, limit=0 if known else None, chain=not known)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        raise
