"""Checkpoint folders; this module and checkpoint_writer.py alone know Orbax.

A checkpoint is one Orbax composite with the items
  params  {"janusflow": ..., "vae": ...}, nested dicts of arrays; "vae" may be absent
  config  whatever dict describes the models
  files   {name: text} of the tokenizer and processor files that belong to the model
  state   what training needs beside params to go on; absent from converted checkpoints
so that a reader takes what it needs, and checksums.json with the crc32 of every file, since neither
Orbax nor its compression notices a flipped bit. A run folder holds such folders, named by step.

Where there are several processes all of them call these functions together; each reads what its
devices hold, and what one of them finds damaged is so for all.
"""

import errno
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from jflow import distributed
from jflow.folders import new_folder

# Arrays are stored and read in chunks of this many bytes, and files of about this many. With
# GROUP_BYTES these bound what a save or a restore needs on top of the parameters: Orbax's own
# defaults take half the parameters' size again to save and two thirds to restore.
CHUNK_BYTES = 8 * 2**20
FILE_BYTES = 64 * 2**20
# Arrays are restored, and those that are Later saved, in groups of about this many bytes.
GROUP_BYTES = 64 * 2**20
CHECKSUMS = "checksums.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # behind the names of folders that Orbax is writing


class DamagedError(ValueError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Later:
    """An array that is read each time np.asarray asks for it, and not kept: what is converted needs
    not be in memory as a whole."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_checkpoint(
    path: str | Path, params: dict, config: dict, files: dict[str, str], state: Any = None
) -> None:
    """Writes a checkpoint folder; on failure nothing is left of it.

    Args:
      path: must not exist, or be an empty folder.
      params: {"janusflow": ..., "vae": ...} of numpy or jax arrays or of Later, stored in their
        dtypes.
      config, files: see the module; both must be expressible in JSON.
      state: any tree of arrays, None for none.

    Raises FileExistsError for a path that is taken, OSError for one that cannot be written.
    """
    with new_folder(path) as folder:
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(folder, items(params, config, files, state))
            write_checksums(folder)
        except MemoryError:
            raise
        except Exception as error:  # Orbax and TensorStore raise many types for a full disk.
            raise OSError(
                f"{path} cannot be written: make room, or choose another folder. "
                f"({first_cause(error)})"
            ) from error


def items(params: dict, config: dict, files: dict[str, str], state: Any) -> ocp.args.Composite:
    """What Orbax is to write, of the arguments of `save_checkpoint`."""

    def arrays(tree):
        save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
        return ocp.args.PyTreeSave(
            tree, save_args=save_args, ocdbt_target_data_file_size=FILE_BYTES
        )

    # The small ones first: Orbax waits in this order, and would leave them half written where the
    # arrays find no room.
    found = {
        "config": ocp.args.JsonSave(config),
        "files": ocp.args.JsonSave(files),
        "params": arrays(params),
    }
    if state is not None:
        found["state"] = arrays(_named(state))
    return ocp.args.Composite(**found)


def load_checkpoint(
    path: str | Path,
    dtype: jnp.dtype | None = None,
    sharding: jax.sharding.Sharding | dict | Callable[[dict], dict] | None = None,
) -> tuple[dict, dict, dict[str, str]]:
    """Reads (params, config, files) of a checkpoint, or of the latest one of a run folder.

    Args:
      dtype: of the parameters; None for the stored dtypes.
      sharding: where to put them: one for all, a tree of them, or a function that makes such a
        tree of one of shapes, as sharding.shardings does; None for the default device.

    Raises FileNotFoundError or ValueError in one sentence for what is no whole checkpoint.
    """
    folder, shapes, config, files = _opened(path)
    if callable(sharding):
        sharding = sharding(shapes)
    elif not isinstance(sharding, dict):
        sharding = jax.tree.map(lambda _: sharding or place_of(None), shapes)
    restore_args = jax.tree.map(
        lambda _, place: ocp.ArrayRestoreArgs(sharding=place, dtype=dtype), shapes, sharding
    )
    groups, arrays = _groups(shapes), []
    for group in np.unique(groups):
        arrays += _restore_group(folder, restore_args, groups == group)
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays), config, files


def open_checkpoint(path: str | Path) -> tuple[dict, dict, dict[str, str]]:
    """`load_checkpoint` with parameters that are Later: memory holds a group of GROUP_BYTES and the
    array that begins it, where they are read in the order of their tree."""
    folder, shapes, config, files = _opened(path)
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    groups, restored = _groups(shapes), {}

    def read(i: int) -> np.ndarray:
        if i not in restored:
            restored.clear()
            wanted = groups == groups[i]
            arrays = _restore_group(folder, restore_args, wanted)
            restored.update(zip(np.flatnonzero(wanted), arrays, strict=True))
        return restored[i]

    leaves, structure = jax.tree.flatten(shapes)
    later = [
        Later(tuple(leaf.shape), np.dtype(leaf.dtype), partial(read, i))
        for i, leaf in enumerate(leaves)
    ]
    return structure.unflatten(later), config, files


def _opened(path: str | Path) -> tuple[Path, dict, dict, dict[str, str]]:
    """(folder, shapes of the parameters, config, files) of a checkpoint whose files are whole."""
    folder = find_checkpoint(path)
    config, files = read_metadata(folder)
    with _checkpointer() as checkpointer, _reported_as_damage(folder):
        _verify(folder)
        shapes = checkpointer.metadata(folder).item_metadata.params.tree
    return folder, shapes, config, files


def _groups(arrays: Any) -> np.ndarray:
    """The number of each leaf's group, of about GROUP_BYTES, in their order; leaves with a shape
    and a dtype."""
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays)]
    return np.cumsum(sizes) // GROUP_BYTES


def _restore_group(folder: Path, restore_args: dict, wanted: np.ndarray) -> list:
    """The parameters that are wanted, a bool for each leaf."""
    leaves, structure = jax.tree.flatten(restore_args)
    tree = structure.unflatten(
        leaf if want else ocp.PLACEHOLDER for leaf, want in zip(leaves, wanted, strict=True)
    )
    item = ocp.args.PyTreeRestore(tree, restore_args=restore_args)
    with _checkpointer() as checkpointer, _reported_as_damage(folder):
        restored = checkpointer.restore(folder, ocp.args.Composite(params=item)).params
    return [leaf for leaf in jax.tree.leaves(restored) if leaf is not ocp.PLACEHOLDER]


def load_shapes(path: str | Path) -> dict:
    """The parameters of a checkpoint as jax.ShapeDtypeStruct; errors as in load_checkpoint."""
    folder = find_checkpoint(path)
    with _checkpointer() as checkpointer, _reported_as_damage(folder):
        shapes = checkpointer.metadata(folder).item_metadata.params.tree
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    return shapes


def load_state(path: str | Path, like: Any) -> Any:
    """Reads what `save_checkpoint` was given as `state`.

    Args:
      like: a tree of the same structure, of arrays or jax.ShapeDtypeStruct; where these know a
        sharding, the arrays will lie so, the others on the default device.

    Raises ValueError in one sentence if there is none, or one of another structure.
    """
    folder, expected = find_checkpoint(path), _named(like)
    found = _state_shapes(folder)
    if {name: tuple(leaf.shape) for name, leaf in expected.items()} != found:
        raise ValueError(f"The training state in {path} is that of another model or optimizer.")
    places = {name: place_of(leaf) for name, leaf in expected.items()}
    restored = _load_named(folder, found, places)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in expected])


def load_entry(
    path: str | Path, entry: str, sharding: Callable[[dict], dict] | None = None
) -> dict[str, jax.Array]:
    """Reads of the `state` one entry that is a flat dict {"a/b": array}.

    Args: sharding: makes a dict of them of one of shapes; None for the default device.

    Raises ValueError in one sentence if there is no training state.
    """
    folder, prefix = find_checkpoint(path), f"{entry}."
    found = _state_shapes(folder)
    shapes = {
        name.removeprefix(prefix): jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in found.items()
        if name.startswith(prefix)
    }
    places = sharding(shapes) if sharding else {name: place_of(None) for name in shapes}
    places = {prefix + name: place for name, place in places.items()}
    restored = _load_named(folder, found, places)
    return {name: restored[prefix + name] for name in shapes}


def _state_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all leaves of the state; raises ValueError where there is none that can be
    read."""
    if not (folder / "state").is_dir():
        raise ValueError(f"{folder} holds no training state: it was converted, or begins a run.")
    with _checkpointer() as checkpointer, _reported_as_damage(folder):
        tree = checkpointer.metadata(folder).item_metadata.state.tree
    if all(name.isdigit() for name in tree):
        raise ValueError(
            f"The training state in {folder} was written by an earlier version of jflow: begin a "
            f"new run with it as init_from."
        )
    return {name: tuple(leaf.shape) for name, leaf in tree.items()}


def _load_named(
    folder: Path, names: Iterable[str], places: dict[str, jax.sharding.Sharding]
) -> dict[str, jax.Array]:
    """The leaves of the state that have a place, there. names: of all leaves."""
    item = ocp.args.PyTreeRestore(
        {name: 0 if name in places else ocp.PLACEHOLDER for name in names},
        restore_args={
            name: ocp.ArrayRestoreArgs(sharding=places.get(name, place_of(None))) for name in names
        },
    )
    with _checkpointer() as checkpointer, _reported_as_damage(folder):
        return checkpointer.restore(folder, ocp.args.Composite(state=item)).state


def place_of(leaf: Any) -> jax.sharding.Sharding:
    """Where an array lies, or a jax.ShapeDtypeStruct will; the default device for one that does not
    say."""
    place = getattr(leaf, "sharding", None)
    return place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of any tree by their paths: Orbax would not give back its tuples and classes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(keys, simple=True, separator="."): leaf for keys, leaf in leaves}


def read_metadata(path: str | Path) -> tuple[dict, dict[str, str]]:
    """(config, files) of a checkpoint, without its parameters; errors as in load_checkpoint."""
    folder = find_checkpoint(path)
    with _checkpointer() as checkpointer, _reported_as_damage(folder):
        _verify(folder, ("config/", "files/"))
        items = ocp.args.Composite(config=ocp.args.JsonRestore(), files=ocp.args.JsonRestore())
        restored = checkpointer.restore(folder, items)
    return restored.config, restored.files


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder at `path`: itself, or the latest complete step of a run folder.

    Raises FileNotFoundError in one sentence where there is none, ValueError for a Hugging Face one.
    """
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {path}.")
    if is_checkpoint(folder):
        return folder
    steps = [step for step in folder.iterdir() if step.name.isdigit() and is_checkpoint(step)]
    if steps:
        return max(steps, key=lambda step: int(step.name))
    if (folder / "config.json").is_file() or any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{path} is a Hugging Face folder: convert it with "
            f"python -m jflow.convert from-hf {path} --vae VAE --out DIR."
        )
    raise FileNotFoundError(f"{path} is not a complete jflow checkpoint: it has no {CHECKSUMS}.")


def agreed_on(path: str | Path) -> Path:
    """`find_checkpoint`, the same for all processes: some may see the latest step later."""
    return Path(distributed.gather_texts(str(find_checkpoint(path)))[0])


def is_checkpoint(folder: Path) -> bool:
    """Was this folder written to its end? Its checksums come last."""
    return (folder / CHECKSUMS).is_file()


def remove_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint folder; what stays of it, where that is stopped or some of it is in use,
    has a name that counts for nothing."""
    gone = folder.with_name(folder.name + UNFINISHED)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def write_checksums(folder: Path) -> None:
    """Completes a checkpoint folder: without this file it does not count as one."""
    sums = {
        file.relative_to(folder).as_posix(): _crc32(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(CHECKSUMS)
    }
    partial = folder / f"{CHECKSUMS}.tmp"
    partial.write_text(json.dumps(sums, indent=1), encoding="utf-8")
    os.replace(partial, folder / CHECKSUMS)


def _crc32(file: Path) -> int:
    checksum = 0
    with file.open("rb") as data:
        while part := data.read(CHUNK_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _verify(folder: Path, parts: tuple[str, ...] = ("",)) -> None:
    """Raises ValueError for the first file that is not what was written; each process looks at its
    share of the files whose names begin with one of `parts`."""
    sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    wanted = [item for item in sums.items() if item[0].startswith(parts)]
    for name, checksum in wanted[jax.process_index() :: jax.process_count()]:
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing.")
        if _crc32(folder / name) != checksum:
            raise ValueError(f"{name} is not what was written.")


class _LaterHandler(type_handlers.NumpyHandler):
    """Reads a group of what is Later when its turn has come to be written, and writes it before the
    next one."""

    async def serialize(self, values, infos, args=None):
        written = self._write_groups(values, infos, args)
        return [ocp.future.CommitFutureAwaitingContractedSignals(written)]

    async def _write_groups(self, values, infos, args):
        groups = _groups(values)
        for group in np.unique(groups):
            wanted = np.flatnonzero(groups == group)
            await self._write(*([of[i] for i in wanted] for of in (values, infos, args)))

    async def _write(self, values, infos, args):
        (written,) = await super().serialize([np.asarray(value) for value in values], infos, args)
        written.result()


def handler() -> ocp.CompositeCheckpointHandler:
    """What Orbax reads and writes our items with."""
    handlers = type_handlers.create_type_handler_registry(
        # Orbax would copy all arrays first, against writes during an asynchronous save.
        (np.ndarray, type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (Later, _LaterHandler(deepcopy_host_arrays=False)),
        # Copies of a small array are not worth a program that cuts each its part of the work.
        (jax.Array, type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=CHUNK_BYTES)),
    )
    return ocp.CompositeCheckpointHandler(
        params=ocp.PyTreeCheckpointHandler(type_handler_registry=handlers),
        state=ocp.PyTreeCheckpointHandler(type_handler_registry=handlers),
        config=ocp.JsonCheckpointHandler(),
        files=ocp.JsonCheckpointHandler(),
    )


def _checkpointer() -> ocp.Checkpointer:
    """One that waits for no other process: what they have to agree on is agreed on here."""
    own = jax.process_index()
    return ocp.Checkpointer(
        handler(),
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=own, active_processes={own}
        ),
    )


@contextmanager
def _reported_as_damage(folder: Path) -> Iterator[None]:
    """What fails in the block on one process is a DamagedError on all; an OSError where the disk
    failed, as nothing says then that the checkpoint is not good."""
    cause, damage, failure = None, "", ""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # no fault of the files
    except Exception as error:
        cause, reason = error, first_cause(error) or type(error).__name__
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            failure = reason
        else:  # Orbax and TensorStore raise many types, bare Exception among them.
            damage = reason
    texts = [json.loads(text) for text in distributed.gather_texts(json.dumps([damage, failure]))]
    for found in filter(None, (failure for _, failure in texts)):
        raise OSError(f"{folder} cannot be read ({found}): try the same command again.") from cause
    for found in filter(None, (damage for damage, _ in texts)):
        raise DamagedError(f"The checkpoint {folder} is damaged or incomplete: {found}") from cause


def first_cause(error: BaseException) -> str:
    """The text of the exception that the others were raised from, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:200]
