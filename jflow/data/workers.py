"""Processes that make data beside the one that trains; threads would share one Python lock."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

S, T = TypeVar("S"), TypeVar("T")
_CHUNK = 250  # items that a process is given at once, of which each takes about a millisecond


def pool(workers: int, begin: Callable[..., None] | None = None, *args: Any) -> ProcessPoolExecutor:
    """Processes, each of which calls begin(*args) first, copied from one that has imported what the
    program has of jflow.  They end with the program, and with it alone: a signal that a whole job
    is sent is for the main process to answer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("jflow.")])
    return ProcessPoolExecutor(workers, context, _begin, (begin, args))


def ahead(submit: Callable[[S], Future[T]], jobs: Iterable[S], count: int) -> Iterator[T]:
    """The results of jobs in order, `count` of them on their way ahead of the one at hand."""
    waiting: deque[Future[T]] = deque()
    for job in jobs:
        waiting.append(submit(job))
        if len(waiting) > count:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if begin is not None:
        begin(*args)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(0)
