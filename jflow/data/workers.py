"""Processes that make data beside the one that trains; threads would share one Python lock."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver, resource_tracker
from typing import Any, TypeVar

S, T = TypeVar("S"), TypeVar("T")
_OF_THE_JOB = {signal.SIGINT, signal.SIGTERM}
_CHUNK = 250  # items that a process is given at once, of which each takes about a millisecond


class _Pool(ProcessPoolExecutor):
    def submit(self, *args: Any, **kwargs: Any) -> Future:
        future = super().submit(*args, **kwargs)
        future.add_done_callback(_end_what_is_broken)
        return future


def _end_what_is_broken(future: Future) -> None:
    """Where one process has died Python sends SIGTERM to the others, and waits for their end."""
    if not future.cancelled() and isinstance(future.exception(), BrokenProcessPool):
        for process in multiprocessing.active_children():
            process.kill()


def pool(workers: int, begin: Callable[..., None] | None = None, *args: Any) -> ProcessPoolExecutor:
    """Processes, each of which calls begin(*args) first, copied from one that has imported what the
    program has of jflow.  They end with the program, and with it alone: a signal that a whole job
    is sent is for the main process to answer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("jflow.")])
    # A process has the mask of its parent: so has the one that is copied. The tracker, which would
    # be begun on the way there, lifts it.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_JOB)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return _Pool(workers, context, _begin, (begin, args))


def ahead(submit: Callable[[S], Future[T]], jobs: Iterable[S], count: int) -> Iterator[T]:
    """The results of jobs in order, `count` of them on their way ahead of the one at hand.

    Raises OSError in one sentence where a process has died, and what a job raised.
    """
    waiting: deque[Future[T]] = deque()
    try:
        for job in jobs:
            waiting.append(submit(job))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError(
            "A process that made data has died, mostly for want of memory: lower data.workers or "
            "data.prefetch, and give the same command again."
        ) from error


def in_processes(make: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """`map` by all cores, where there is enough for each of them; `make` is to be pickled."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores or 1, len(items) // (8 * _CHUNK))
    if workers < 2:
        yield from map(make, items)
        return
    parts = (items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK))
    with pool(workers) as processes:
        for made in ahead(lambda part: processes.submit(_all, make, part), parts, 2 * workers):
            yield from made


def _all(make: Callable[[S], T], items: Sequence[S]) -> list[T]:
    return [make(item) for item in items]


def _begin(begin: Callable[..., None] | None, args: tuple) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*args)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(0)
