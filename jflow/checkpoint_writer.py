"""Checkpoints written in the background, while training goes on."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jflow import checkpoints, distributed
from jflow.compilation import out_of_memory

# How long a save may take, and how long the processes wait at its end for the first one, which
# reads it once more for its checksums. It is not what a lost process costs: the others end with it,
# within minutes.
COMPLETE_SECONDS = 3600
# Where a folder cannot be made, threads that have begun would wait for it for five minutes.
OPTIONS = ocp.options.AsyncOptions(COMPLETE_SECONDS, create_directories_asynchronously=False)


class Writer:
    """Writes checkpoints in the background, one at a time, while their arrays may be given away.

    Where there are several processes each writes what its devices hold, and all of them call these
    methods together.

    A save that ends in the middle, by an error or a kill, leaves a folder without checksums at
    most. An error is raised by the next call of any method, as OSError in one sentence.
    """

    def __init__(self):
        self._checkpointer = ocp.AsyncCheckpointer(checkpoints.handler(), async_options=OPTIONS)
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._job: Future | None = None
        self._saves = 0

    def save(
        self,
        path: str | Path,
        params: dict,
        config: dict,
        files: dict[str, str],
        state: Any = None,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Returns when the arrays are copied to the host; if need be, waits for the save before.

        Args: as of `checkpoints.save_checkpoint`, but what is at `path` is replaced; then: called
          in the background, by process 0, once the checkpoint is complete.
        """
        self.wait()
        self._saves += 1
        folder = Path(path).resolve()
        with _reported_as_unwritten(folder):
            self._checkpointer.save(
                folder, checkpoints.items(params, config, files, state), force=True
            )
        self._job = self._thread.submit(self._complete, folder, then)

    def _complete(self, folder: Path, then: Callable[[], None]) -> None:
        with _reported_as_unwritten(folder):
            self._checkpointer.wait_until_finished()
            if distributed.is_first():
                checkpoints.write_checksums(folder)
            distributed.wait_for_all(f"checkpoint {self._saves}", COMPLETE_SECONDS)
        if distributed.is_first():
            then()

    def check(self) -> None:
        """Raises the error of a save that has failed meanwhile; waits for nothing."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything is written."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """`wait`, then no more saves."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()


@contextmanager
def _reported_as_unwritten(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Orbax and TensorStore raise many types for a full disk or a lost right.
        if distributed.is_first():
            remove_unfinished(folder.parent)
        if out_of_memory(error):
            raise
        reason = checkpoints.first_cause(error)
        raise OSError(
            f"The checkpoint {folder} cannot be written ({reason}); those before it are whole: "
            f"make room, or make the folder writable, and give the same command again."
        ) from error


def remove_unfinished(run: Path) -> None:
    """Removes what saves that ended in the middle have left in a run folder."""
    for folder in run.glob("[0-9]*"):
        step, mark, _ = folder.name.partition(checkpoints.UNFINISHED)
        begun = (folder / "_CHECKPOINT_METADATA").is_file()
        # A marked one may have its checksums still: it was being removed.
        if step.isdigit() and (mark or begun and not checkpoints.is_checkpoint(folder)):
            shutil.rmtree(folder, ignore_errors=True)
