"""Run folders: a checkpoint every so many steps, and the way back to the last good one.

RUN/00001000/ is a checkpoint as sample.py and jflow.convert read it, its parameters the averaged
ones, with the rest of the training state beside them. RUN/metrics.jsonl and RUN/tensorboard are the
log, RUN/train.json the config, RUN/samples what was drawn on the way.
"""

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jflow import checkpoints, distributed, folders
from jflow.checkpoint_writer import Writer, remove_unfinished
from jflow.config import to_dict
from jflow.training import lora
from jflow.training.config import TrainConfig
from jflow.training.lora import LoraConfig
from jflow.training.optimizer import merge
from jflow.training.state import TrainState, is_finite

# What may differ between a run and its continuation without changing what is computed, but for
# the order of sums.
FREE_FIELDS = (
    "steps",
    "log_every",
    "save_every",
    "keep",
    "keep_best",
    "rewind_after",
    "max_rewinds",
    "samples",
    "wandb",
    "mesh",
    "remat",
    "unroll",
    "optimizer.accumulate",
    "objective.ar_chunk",
    "objective.time_bins",
    "data.threads",
    "data.prefetch",
    "data.workers",
    "data.max_broken_share",
    "data.broken_check_steps",
)
# What averages and frozen parameters are is in the checkpoint's `params`, the rest in its `state`.
_REST = ("step", "skipped", "skipped_in_row", "data_offset", "params", "opt_state", "guard")


def load_raw(
    path: str | Path,
    dtype: jnp.dtype | None = None,
    sharding: Callable[[dict], dict] | None = None,
) -> tuple[dict, dict, dict[str, str]]:
    """`checkpoints.load_checkpoint` with the parameters that were trained as the last step left
    them, instead of their average.

    Raises ValueError in one sentence for a checkpoint without a training state.
    """
    found = checkpoints.find_checkpoint(path)  # The run may go on and save the next one.
    trained, kernels = (
        checkpoints.load_entry(found, entry, sharding) for entry in ("params", "lora")
    )
    params, config, files = checkpoints.load_checkpoint(found, dtype, sharding)
    factors = config["train"]["lora"]
    merged = lora.merge(
        merge(flatten_dict(params, sep="/") | kernels, trained),
        LoraConfig(**factors) if factors else None,
    )
    return jax.tree.map(lambda leaf: leaf.astype(dtype or leaf.dtype), merged), config, files


def steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, the latest first."""
    named = [folder for folder in run.glob("[0-9]*") if folder.name.isdigit()]
    return sorted((int(one.name) for one in named if checkpoints.is_checkpoint(one)), reverse=True)


def folder(run: Path, step: int) -> Path:
    return run / f"{step:08d}"


class Checkpoints:
    """Those of one run; writes them in the background.

    Where there are several processes all of them call these methods together.

    Args:
      run: the run folder, made where it does not exist, on a disk that all processes share.
      models: {"janusflow", "siglip", "vae"} as jflow.convert stores them; files: the tokenizer's.
      records: how many every source has (Loader.records): with others the order would be another.

    Raises OSError in one sentence for a folder that cannot be written, and ValueError for one that
    is an address and where processes count other records.
    """

    def __init__(
        self,
        run: Path,
        models: dict,
        files: dict[str, str],
        config: TrainConfig,
        records: dict[str, int],
    ):
        self._run, self._models, self._files, self._config = run, models, files, config
        self._records = records
        _compare(records)
        folders.require_local(run)
        distributed.by_first(lambda: _prepare(run))
        if not run.is_dir():
            raise OSError(
                f"Process 0 made the run folder {run}, which is not there for process "
                f"{jax.process_index()}: choose one on a disk that they share, with --run."
            )
        self._writer = Writer()
        self._losses = {step: _loss(folder(run, step)) for step in self._steps()}
        # Steps whose checkpoint is of this very course of training: not a damaged one, nor one
        # that a rewind left behind.
        self._written: set[int] = set()

    def _steps(self) -> list[int]:
        """`steps`, the same on all processes."""
        return distributed.by_first(lambda: steps(self._run))

    def save(self, state: TrainState) -> Path:
        """Begins to write the checkpoint of the state's step; returns its folder-to-be.

        Once it is written, others are removed, see `_remove_others`. Raises ValueError for a state
        with a number that is not finite, and OSError for a checkpoint that cannot be written, this
        one or the one before.
        """
        step = int(state.step)
        target = folder(self._run, step)
        if step in self._written:
            return target
        if not is_finite(state):
            raise ValueError(
                f"Parameters or averages are not finite at step {step}, which is not saved: "
                f"begin from another checkpoint than {self._config.init_from}, or lower the "
                f"learning rate."
            )
        # The guard's level, a mean over the last 100 steps; None before the first one.
        level = float(np.asarray(state.guard.mean)[0]) if state.guard.count else None
        self._losses[step] = level, int(state.guard.mixture)
        self._writer.save(
            target,
            lora.merge(merge(state.ema, state.frozen), self._config.lora),
            self._models
            | {
                "train": to_dict(self._config),
                "loss": level,
                "mixture": int(state.guard.mixture),
                "records": self._records,
            },
            self._files,
            {name: getattr(state, name) for name in _REST}
            | {"lora": lora.unmerged(state.ema | state.frozen)},
            then=partial(self._remove_others, step, step - int(state.skipped_in_row)),
        )
        self._written.add(step)
        return target

    def _remove_others(self, step: int, good: int) -> None:
        """All but the last `keep` up to `step`, the best of them, and the last one up to `good`,
        which a rewind may go back to. What lies behind `step` is damaged, or of another course."""
        found = steps(self._run)
        ours = [one for one in found if one <= step]
        kept = {*ours[: self._config.keep], *[one for one in ours if one <= good][:1]}
        if self._config.keep_best:
            kept.add(self.best(ours))
        for one in set(found) - kept:
            checkpoints.remove_checkpoint(folder(self._run, one))

    def best(self, among: list[int]) -> int:
        """The step of the lowest smoothed training loss, the later one of equals; of those that had
        the last one's mixture, as other tasks have other losses."""
        unknown = None, None
        _, now = self._losses.get(max(among), unknown)

        def order(step):
            loss, mixture = self._losses.get(step, unknown)
            return mixture != now, loss is None, loss, -step

        return min(among, key=order)

    def check(self) -> None:
        """Raises OSError if a checkpoint could not be written meanwhile."""
        self._writer.check()

    def close(self) -> None:
        """Waits until everything is written."""
        self._writer.close()

    def restore(self, like: TrainState, before: int = sys.maxsize) -> TrainState | None:
        """The state of the last good checkpoint up to step `before`; None where there is none.

        A damaged checkpoint is named and the one before it used. Raises ValueError for checkpoints
        of another config or with other numbers of records, and where all of them are damaged.

        Args: like: a state of the same run, arrays or jax.ShapeDtypeStruct; each leaf is read to
          where it lies there (sharding.abstract), no process reads more than its devices hold.
        """
        self._writer.wait()
        self._written = set()
        damaged = []
        for step in self._steps():
            if step <= before:
                try:
                    found = self._read(folder(self._run, step), like)
                except checkpoints.DamagedError as error:
                    damaged.append(str(error))
                    continue
                self._written.add(step)
                if damaged and distributed.is_first():
                    print(*damaged, f"Going on from step {step}.", file=sys.stderr)
                return found
        if damaged:
            # To begin anew would write over what may only be out of reach for a moment.
            raise ValueError(
                " ".join(damaged) + f" {self._run} has no other: try again, or remove what is "
                f"damaged there to begin anew."
            )
        return None

    def _read(self, path: Path, like: TrainState) -> TrainState:
        ours, _ = checkpoints.read_metadata(path)
        now, then = (_fixed(config) for config in (to_dict(self._config), ours["train"]))
        changed = [name for name in now | then if now.get(name) != then.get(name)]
        if changed:
            raise ValueError(
                f"{path} was trained with another {', '.join(changed)}: use another --run folder, "
                f"or the same config."
            )
        counted = ours.get("records", self._records)  # Older checkpoints have none.
        for source, count in self._records.items():
            if counted[source] != count:
                raise ValueError(
                    f"{source} has {count} records, and had {counted[source]} when {path} was "
                    f"saved, so the order of all of them would change: put the former ones back, "
                    f"or begin another --run with {path} as init_from."
                )
        averaged = like.ema | like.frozen
        places = unflatten_dict(
            {
                name: checkpoints.place_of(leaf)
                for name, leaf in averaged.items()
                if not re.match(lora.FACTORS, name)
            },
            sep="/",
        )
        rest = {name: getattr(like, name) for name in _REST} | {"lora": lora.unmerged(averaged)}
        params, _, _ = checkpoints.load_checkpoint(path, sharding=places)
        averaged = flatten_dict(params, sep="/")
        rest = checkpoints.load_state(path, rest)
        averaged |= rest.pop("lora")
        return like.replace(
            ema={name: averaged[name] for name in like.ema},
            frozen={name: averaged[name] for name in like.frozen},
            **rest,
        )


def _fixed(config: dict) -> dict:
    """{"group.field": value} of a config as `to_dict` gives it, without FREE_FIELDS."""
    fields = flatten_dict(config, sep=".")
    free = tuple(f"{name}." for name in FREE_FIELDS)
    return {name: value for name, value in fields.items() if not f"{name}.".startswith(free)}


def _compare(records: dict[str, int]) -> None:
    """Raises ValueError, on all processes, where one has other records than another."""
    everyone = [json.loads(text) for text in distributed.gather_texts(json.dumps(records))]
    for source in records:
        counts = [found[source] for found in everyone]
        if len(set(counts)) > 1:
            raise ValueError(
                f"{source} has from {min(counts)} to {max(counts)} records, by process: give all "
                f"of them the same files, best on a disk that they share."
            )


def _prepare(run: Path) -> None:
    """Makes a run folder that can be written, and removes what unfinished saves left in it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        probe = run / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"The run folder {run} cannot be written ({error.strerror}): make it writable, or "
            f"choose another with --run."
        ) from error
    remove_unfinished(run)


def _loss(path: Path) -> tuple[float | None, int | None]:
    """The smoothed training loss that a checkpoint was saved with, and the number of the mixture
    that it is of; None for a damaged one."""
    try:
        saved = checkpoints.read_metadata(path)[0]
    except checkpoints.DamagedError:
        return None, None
    return saved["loss"], saved.get("mixture")
