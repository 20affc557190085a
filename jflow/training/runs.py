"""Run folders: a checkpoint every so many steps, and the way back to the last good one.

RUN/00001000/ is a checkpoint as sample.py and jflow.convert read it, its parameters the averaged
ones, with the rest of the training state beside them; RUN/metrics.jsonl is the log.
"""

import shutil
import sys
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict

from jflow import checkpoints
from jflow.config import to_dict
from jflow.training.config import TrainConfig
from jflow.training.optimizer import merge
from jflow.training.state import TrainState

# What may differ between a run and its continuation without changing what is computed.
FREE_FIELDS = ("steps", "log_every", "save_every", "keep")


def steps(run: Path) -> list[int]:
    """The steps of a run's complete checkpoints, the latest first."""
    found = [folder for folder in run.glob("[0-9]*") if checkpoints.is_checkpoint(folder)]
    return sorted((int(folder.name) for folder in found), reverse=True)


def folder(run: Path, step: int) -> Path:
    return run / f"{step:08d}"


def save(
    run: Path, state: TrainState, models: dict, files: dict[str, str], config: TrainConfig
) -> Path:
    """Writes the checkpoint of the state's step, then removes all but the last `keep`.

    Args:
      models: {"janusflow", "siglip", "vae"} as jflow.convert stores them; files: the tokenizer's.
    """
    target = folder(run, int(state.step))
    if not checkpoints.is_checkpoint(target):
        # What averages and frozen parameters are is in `params`; the rest is in `state`.
        rest = {
            name: getattr(state, name)
            for name in ("step", "skipped", "params", "opt_state", "guard")
        }
        params = merge(state.ema, state.frozen)
        described = models | {"train": to_dict(config)}
        checkpoints.save_checkpoint(target, params, described, files, rest)
    for step in steps(run)[config.keep :]:
        shutil.rmtree(folder(run, step))
    return target


def restore(run: Path, fresh: TrainState, config: TrainConfig) -> TrainState:
    """The state of the last good checkpoint of a run, or `fresh` where there is none.

    A damaged checkpoint is named and the one before it used. Raises ValueError for checkpoints of
    another config.
    """
    for step in steps(run):
        try:
            return _restore(folder(run, step), fresh, config)
        except checkpoints.DamagedError as error:
            print(f"{error} Going on from the checkpoint before it.", file=sys.stderr)
    return fresh


def _restore(path: Path, fresh: TrainState, config: TrainConfig) -> TrainState:
    ours, _ = checkpoints.read_metadata(path)
    now, then = to_dict(config), ours["train"]
    changed = [name for name in now if name not in FREE_FIELDS and now[name] != then.get(name)]
    if changed:
        raise ValueError(
            f"{path} was trained with another {', '.join(changed)}: use another --run folder, or "
            f"the same config."
        )
    params, _, _ = checkpoints.load_checkpoint(path)
    averaged = flatten_dict(params, sep="/")
    rest = {
        name: getattr(fresh, name) for name in ("step", "skipped", "params", "opt_state", "guard")
    }
    rest = checkpoints.load_state(path, jax.eval_shape(lambda: rest))
    return fresh.replace(
        ema={name: averaged[name] for name in fresh.ema},
        frozen={name: averaged[name] for name in fresh.frozen},
        **rest,
    )
