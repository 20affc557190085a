"""Folders that are written: they appear whole, or not at all."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_local(path: str | Path) -> None:
    """Raises ValueError for an address such as gs://bucket/run, which Path takes for a folder."""
    if re.match(r"\w+:/", str(path)):
        raise ValueError(f"{path} is an address: mount it as a folder, and name that instead.")


def require_new(path: str | Path) -> None:
    """Raises FileExistsError for a path that is taken, ValueError for one that is not local or that
    no folder can be moved to; an empty folder is fine."""
    require_local(path)
    path = Path(path)
    if path.is_mount():
        raise ValueError(f"{path} is where a disk is mounted: name a new folder inside of it.")
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists already: choose another folder or delete it.")


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """The name of a folder to make and fill in the block.

    It becomes `path` when the block ends, and vanishes when it fails.
    """
    path = Path(path).resolve()
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        folder = Path(scratch) / path.name
        yield folder
        os.replace(folder, path)
