"""What is trained on, and in which proportions: configs, and the exact mixture of every batch.

Nothing here reads data: which task a row of a batch is for follows from (config, step) alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from jflow.prompts import Template
from jflow.rng import require_seed

Task = Literal["generation", "understanding", "text"]
# Generation first: `interleave` keeps the first within one row of its share in every batch.
TASKS: tuple[Task, ...] = ("generation", "understanding", "text")


@dataclass(frozen=True)
class SourceConfig:
    """One source; kind, path, split, fields and image_folder as `sources.open_source` has them.

    fields: pairs (our name, the file's name). weight: this source's samples among those of its
    task, relative to the other sources'. template: see `prompts.Template`.
    """

    task: Task
    kind: Literal["tfds", "jsonl", "parquet", "webdataset"]
    path: str
    split: str = "train"
    fields: tuple[tuple[str, str], ...] = ()
    image_folder: str = ""
    weight: int = 1
    template: Template = "chat"

    def __post_init__(self):
        if self.task not in TASKS:
            raise ValueError(f"There is no task {self.task!r}: use one of {', '.join(TASKS)}.")
        if self.template not in get_args(Template):
            raise ValueError(f"There is no template {self.template!r}: use chat or pretrain.")
        if self.weight < 1:
            raise ValueError(f"The weight of {self.path} must be a whole number from 1 on.")


@dataclass(frozen=True)
class MixtureConfig:
    """Shares of the rows of every batch, from a step on; Table 1 gives them in percent."""

    from_step: int
    understanding: int
    generation: int
    text: int


@dataclass(frozen=True)
class WindowConfig:
    """`samples` are packed into `rows` rows at a time.

    With too many samples some are left out, with too few rows stay empty: both are reported.
    """

    samples: int
    rows: int

    def __post_init__(self):
        if min(self.samples, self.rows) < 1:
            raise ValueError(f"A window needs samples and rows, at least 1 of each: {self}.")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on. Defaults: the paper's stage 2, except for the sources.

    batch_rows: rows of all tasks in a batch. images_per_row: the most images to understand,
    crops_per_row the most to generate, and samples_per_row the most samples of any kind, in one
    row. drop_prompt: share of generation samples.
    max_broken_share: of the samples read since the start (of 1,000 at least); beyond, the run
    stops: one of several processes at its first batch, or at one of every broken_check_steps.
    threads and prefetch (in windows): of each process. workers: processes that make the windows
    instead of threads, where these share one Python lock too slowly. cache: folder of `python -m
    jflow.data cache`; "" encodes anew.
    """

    sources: tuple[SourceConfig, ...]
    mixture: tuple[MixtureConfig, ...] = (
        MixtureConfig(0, understanding=30, generation=50, text=20),
        MixtureConfig(10_000, understanding=14, generation=80, text=6),
    )
    batch_rows: int = 512
    max_seq_len: int = 4096
    understanding: WindowConfig = WindowConfig(samples=40, rows=8)
    generation: WindowConfig = WindowConfig(samples=48, rows=8)
    text: WindowConfig = WindowConfig(samples=40, rows=8)
    images_per_row: int = 6
    crops_per_row: int = 6
    samples_per_row: int = 10
    drop_prompt: float = 0.1
    max_broken_share: float = 0.01
    broken_check_steps: int = 50
    seed: int = 0
    threads: int = 8
    prefetch: int = 16
    workers: int = 0
    cache: str = ""

    @property
    def segments(self) -> int:
        """Runs of tokens in a row at most: samples, and the padding behind them."""
        return self.samples_per_row + 1

    @property
    def pool_size(self) -> int:
        """Threads of a pool, which needs one; without any, windows are made where they are waited
        for."""
        return max(self.threads, 1)

    def __post_init__(self):
        least = dict.fromkeys(("images_per_row", "threads", "prefetch", "workers"), 0)
        least |= dict.fromkeys(("batch_rows", "max_seq_len", "crops_per_row", "samples_per_row"), 1)
        for name, low in (least | {"broken_check_steps": 1}).items():
            if (value := getattr(self, name)) < low:
                raise ValueError(f"data.{name} must be at least {low}, not {value}.")
        for name in ("drop_prompt", "max_broken_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {getattr(self, name)}.")
        require_seed(self.seed, "data.seed")
        starts = [phase.from_step for phase in self.mixture]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError("The mixture's phases must start at step 0 and rise in from_step.")
        for phase in self.mixture:
            if min(_shares(phase)) < 0 or not sum(_shares(phase)):
                raise ValueError(
                    f"The shares of {phase} must be at least 0, and not all of them 0."
                )
        served = {source.task for source in self.sources}
        for share, task in zip(zip(*map(_shares, self.mixture), strict=True), TASKS, strict=True):
            if any(share) and task not in served:
                raise ValueError(f"The mixture has a share of {task}, but no source is for it.")


class Row(NamedTuple):
    """Row `number` of the endless stream of rows of one task."""

    task: Task
    number: int


def interleave(position: int, weights: Sequence[int]) -> tuple[int, int]:
    """Which of several streams stands at a position of their exact mixture, and its how-manieth.

    After every sum(weights) positions each stream came exactly its weight often, and at any
    position the first is less than one off its share.
    """
    before, after = count_streams(position, weights), count_streams(position + 1, weights)
    which = next(i for i, n in enumerate(before) if after[i] > n)
    return which, before[which]


def count_streams(length: int, weights: Sequence[int]) -> list[int]:
    """How often each stream comes among the first `length` positions of the mixture."""
    counts, left = [], sum(weights)
    for weight in weights:
        rest = length * (left - weight) // left if left else 0
        counts.append(length - rest)
        length, left = rest, left - weight
    return counts


def _shares(phase: MixtureConfig) -> tuple[int, int, int]:
    return phase.generation, phase.understanding, phase.text


def batch_rows(config: DataConfig, step: int) -> list[Row]:
    """The rows of one batch over all processes, [batch_rows]."""
    before = [0] * len(TASKS)
    for phase, following in zip(config.mixture, [*config.mixture[1:], None], strict=True):
        if following is None or step < following.from_step:
            break
        steps = following.from_step - phase.from_step
        counts = count_streams(steps * config.batch_rows, _shares(phase))
        before = [b + n for b, n in zip(before, counts, strict=True)]
    first = (step - phase.from_step) * config.batch_rows
    rows = []
    for position in range(first, first + config.batch_rows):
        which, number = interleave(position, _shares(phase))
        rows.append(Row(TASKS[which], before[which] + number))
    return rows


def part_sizes(config: DataConfig, step: int, row_multiple: int) -> tuple[int, int]:
    """Rows of a batch's TextRows and ImageRows, the same at all steps of a phase.

    Where a share of the batch is no whole number, or no multiple of row_multiple, the last rows
    are empty: the log's share of padding counts them. Raises ValueError for more parts than rows.
    """
    if row_multiple > config.batch_rows:
        raise ValueError(
            f"A batch of {config.batch_rows} rows cannot be cut into {row_multiple} parts, of "
            f"devices times optimizer.accumulate: lower accumulate, or raise data.batch_rows."
        )
    phase = [phase for phase in config.mixture if phase.from_step <= step][-1]
    generation = _shares(phase)[0]
    shares = (sum(_shares(phase)) - generation, generation)
    wanted = (math.ceil(config.batch_rows * share / sum(shares)) for share in shares)
    text, images = (math.ceil(n / row_multiple) * row_multiple for n in wanted)
    return text, images
