"""From configured sources to batches: exact mixture, packing, split by process, prefetch.

Every row of every batch follows from (config, step) alone: which task it is for, which window of
that task's samples it packs, which records those are, and all that is random in them. So the
position in the data is one integer, the step, and neither a restart nor another number of
processes changes what is trained on. Each process makes only its own rows.

Grain shuffles each source anew every epoch and makes the windows ahead of time in threads; or
processes make them, where a model takes more samples than one Python can make.
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import grain
import jax
import numpy as np

from jflow.batch import Batch, ImageRows, TextRows
from jflow.data import packing, workers
from jflow.data.cache import ImageCache
from jflow.data.examples import Example, Format
from jflow.data.mixture import TASKS, DataConfig, Row, Task, batch_rows, part_sizes
from jflow.data.streams import TaskStream
from jflow.distributed import gather_texts
from jflow.images import ImageProcessor
from jflow.inference.parts import read_processors
from jflow.models.janusflow import JanusFlowConfig
from jflow.models.vae import VAEConfig, latent_side
from jflow.prompts import Tokenizer

_BROKEN_FLOOR = 1_000  # records that the share of broken ones is taken of, at least
_BROKEN_LISTED = 20
_loader: "Loader"  # of a process that makes pieces


@dataclass(frozen=True)
class BatchStats:
    """About one batch. Its counts belong to the windows that begin in it: no record counts twice.

    padding: share of this process's positions that hold nothing. samples: that it read;
    left_out: of them, what did not fit. broken: "where: why" of the records that any process
    skipped since the last check, the same list on each of them.
    """

    padding: float
    samples: int
    left_out: int
    broken: tuple[str, ...]


class _Place(NamedTuple):
    """A row of this process's share of a batch; part "text" is that of TextRows."""

    step: int
    part: Literal["text", "generation"]
    slot: int


@dataclass(frozen=True)
class _Piece:
    """What one thread makes of one window: this process's rows of it and their tokens."""

    rows: Mapping[_Place, tuple[TextRows | ImageRows, int]] = field(default_factory=dict)
    samples: int = 0
    left_out: int = 0
    broken: tuple[str, ...] = ()


class Loader:
    """Batches of this process, from any step on.

    Args:
      config: what to load.
      tokenizer, processor: the checkpoint's own.
      image_size: side of the crops to generate, in pixels; latent_tokens: N of such a crop.
      process_index, process_count: which rows are this process's: the n-th equal part.
      row_multiple: each part of a global batch is filled up with empty rows to a multiple of
        this, for a mesh to divide; process_count must divide it.
      cache: that of config.cache, opened; None without one.

    streams: by task. format: what turns their records into examples.

    Raises FileNotFoundError or ValueError in one sentence for sources that cannot be opened.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        processor: ImageProcessor,
        image_size: int,
        latent_tokens: int,
        process_index: int = 0,
        process_count: int = 1,
        row_multiple: int = 1,
        cache: ImageCache | None = None,
    ):
        if row_multiple % process_count:
            raise ValueError(
                f"Rows in multiples of {row_multiple} do not divide by {process_count} processes."
            )
        if bool(config.cache) != (cache is not None):
            raise ValueError(f"The cache {config.cache!r} must be opened for the loader.")
        self._config, self._cache = config, cache
        self.format = Format(
            tokenizer=tokenizer,
            processor=processor,
            image_size=image_size,
            latent_tokens=latent_tokens,
            max_seq_len=config.max_seq_len,
            drop_prompt=config.drop_prompt,
            seed=config.seed,
        )
        self._process = process_index, process_count
        self._row_multiple = row_multiple
        served = {source.task for source in config.sources}
        self.streams = {
            task: TaskStream(config, task, self.format, cache if task == "generation" else None)
            for task in TASKS
            if task in served
        }
        self._remember()
        starts = [phase.from_step for phase in config.mixture]
        self._jobs_per_step = max(self._most_jobs(step) for step in starts)

    def _remember(self) -> None:
        self._jobs = functools.lru_cache(maxsize=16)(self._list_jobs)

    def __getstate__(self) -> dict[str, Any]:
        """Another process gets the sources as they are indexed here: that is not done again."""
        return {name: value for name, value in vars(self).items() if name != "_jobs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def records(self) -> dict[str, int]:
        """How many records every source has, by its task, path and split."""
        return {
            f"{task}: {config.path} ({config.split})": len(source)
            for task, stream in self.streams.items()
            for config, source in zip(stream.configs, stream.sources, strict=True)
        }

    def local_rows(self, step: int) -> tuple[list[Row | None], list[Row | None]]:
        """This process's rows of TextRows and of ImageRows; None for an empty one."""
        rows = batch_rows(self._config, step)
        parts = (
            [row for row in rows if row.task != "generation"],
            [row for row in rows if row.task == "generation"],
        )
        index, count = self._process
        found = []
        for part, size in zip(parts, self._sizes(step), strict=True):
            padded = [*part, *[None] * (size * count - len(part))]
            found.append(padded[index * size : (index + 1) * size])
        return found[0], found[1]

    def batches(
        self,
        step: int = 0,
        gather: Callable[[str], list[str]] | None = None,
        last: int | None = None,
    ) -> Iterator[tuple[Batch, BatchStats]]:
        """The batches of `step` and all that follow, made ahead of time.

        gather: gives every process's text to every process, at the same step on all of them; None
        for JAX's own collectives. last: a step at which broken records are looked at too, as they
        are at each where there is one process. Raises ValueError with the list of broken records
        once they are more than the configured share: on all processes at the same step.
        """
        config = self._config
        every = 1 if gather is None and jax.process_count() == 1 else config.broken_check_steps
        gather = gather or gather_texts
        pieces = self._in_processes(step) if config.workers else self._in_threads(step)
        rows, samples, new, broken = {}, 0, [], []
        for now in itertools.count(step):
            found = [next(pieces) for _ in range(self._jobs_per_step)]
            rows |= {place: row for piece in found for place, row in piece.rows.items()}
            new += [reason for piece in found for reason in piece.broken]
            samples += sum(piece.samples for piece in found)
            reported = []
            if (now - step) % every == 0 or now == last:
                texts = gather(json.dumps([self._process[0], [samples, new]]))
                # Processes that have the same share, on one mesh row, say the same.
                shares = dict(json.loads(text) for text in texts).values()
                reported, new = [reason for _, part in shares for reason in part], []
                broken += reported
                check_broken(broken, sum(n for n, _ in shares), config.max_broken_share)
            batch, padding = self._assemble(now, rows)
            left_out = sum(piece.left_out for piece in found)
            read = sum(piece.samples for piece in found)
            yield batch, BatchStats(padding, read, left_out, tuple(reported))

    def _in_threads(self, start: int) -> Iterator[_Piece]:
        """What all jobs from step `start` on make, in order."""
        options = grain.ReadOptions(self._config.threads, self._config.prefetch)
        jobs = grain.MapDataset.range(start * self._jobs_per_step, sys.maxsize)
        make = functools.partial(self._make_piece, start=start)
        return iter(jobs.map(make).to_iter_dataset(options))

    def _in_processes(self, start: int) -> Iterator[_Piece]:
        """The same."""
        pool = workers.pool(self._config.workers, _begin_worker, self)
        try:
            yield from workers.ahead(
                lambda job: pool.submit(_make_piece, job, start),
                itertools.count(start * self._jobs_per_step),
                self._config.prefetch,
            )
        finally:
            pool.shutdown(cancel_futures=True)

    def _sizes(self, step: int) -> tuple[int, int]:
        text, images = part_sizes(self._config, step, self._row_multiple)
        return text // self._process[1], images // self._process[1]

    def _most_jobs(self, step: int) -> int:
        """How many windows a step of this phase touches at most: a task's rows are neighbours."""
        text, images = self._sizes(step)
        sizes = {task: images if task == "generation" else text for task in self.streams}
        return sum(
            (size + self.streams[task].window.rows - 2) // self.streams[task].window.rows + 1
            for task, size in sizes.items()
            if size
        )

    def _list_jobs(self, step: int) -> dict[tuple[Task, int], list[tuple[_Place, int]]]:
        """(task, window) -> [(place, row of the window)] of this process's rows of one step."""
        jobs: dict[tuple[Task, int], list[tuple[_Place, int]]] = {}
        for name, part in zip(("text", "generation"), self.local_rows(step), strict=True):
            for slot, row in enumerate(part):
                if row is not None:
                    window, inside = divmod(row.number, self.streams[row.task].window.rows)
                    jobs.setdefault((row.task, window), []).append(
                        (_Place(step, name, slot), inside)
                    )
        return jobs

    def _make_piece(self, index: int, start: int) -> _Piece:
        """A window is made at the first step, from `start` on, that has rows of it, and for those
        that follow; again only where a step without any lies between."""
        step, number = divmod(int(index), self._jobs_per_step)
        known = self._jobs(step - 1) if step > start else {}
        jobs = [job for job in self._jobs(step) if job not in known]
        if number >= len(jobs):
            return _Piece()
        task, window = job = jobs[number]
        wanted: list[tuple[_Place, int]] = []
        while job in self._jobs(step):
            wanted += self._jobs(step)[job]
            step += 1
        stream, config = self.streams[task], self._config
        positions, examples, broken = stream.window_examples(window)
        lengths = [len(example.tokens) for example in examples]
        images = [len(example.slots) for example in examples]
        most = config.crops_per_row if task == "generation" else config.images_per_row
        packed = packing.assign(
            lengths, images, stream.window.rows, config.max_seq_len, most, config.samples_per_row
        )
        begins = any(inside == 0 for _, inside in wanted)
        rows = {}
        for place, inside in wanted:
            chosen = packed[inside]
            row = self._row(task, [examples[i] for i in chosen], [positions[i] for i in chosen])
            rows[place] = row, sum(lengths[i] for i in chosen)
        return _Piece(
            rows=rows,
            samples=begins * stream.window.samples,
            left_out=begins * (len(examples) - sum(map(len, packed))),
            broken=tuple(broken) if begins else (),
        )

    def _row(
        self, task: Task, examples: list[Example], positions: list[int]
    ) -> TextRows | ImageRows:
        config, fmt = self._config, self.format
        if task == "generation":
            return packing.image_row(
                examples,
                positions,
                config.max_seq_len,
                config.crops_per_row,
                fmt.image_size,
                fmt.latent_tokens,
                self._cache.blank if self._cache else None,
            )
        return packing.text_row(
            examples,
            config.max_seq_len,
            config.images_per_row,
            fmt.processor.image_size,
            fmt.tokenizer.num_image_tokens,
        )

    def _assemble(
        self, step: int, rows: dict[_Place, tuple[TextRows | ImageRows, int]]
    ) -> tuple[Batch, float]:
        """The batch of one step out of all rows made so far, and its share of padding."""
        parts, tokens, sizes = [], 0, self._sizes(step)
        for name, size in zip(("text", "generation"), sizes, strict=True):
            empty = self._row(name, [], []), 0
            found = [rows.pop(_Place(step, name, slot), empty) for slot in range(size)]
            tokens += sum(count for _, count in found)
            made = [row for row, _ in found]
            parts.append(jax.tree.map(lambda *leaves: np.stack(leaves), *made) if made else None)
        padding = 1 - tokens / (sum(sizes) * self._config.max_seq_len)
        return Batch(text=parts[0], images=parts[1]), padding


def checkpoint_loader(
    config: DataConfig,
    models: Mapping[str, dict | None],
    files: Mapping[str, str],
    cache: ImageCache | None = None,
    **share: int,
) -> Loader:
    """The loader for the model of a checkpoint: config and files as `read_metadata` gives them.

    share: process_index, process_count and row_multiple of `Loader`.
    """
    model = JanusFlowConfig.from_hf(models["janusflow"], models.get("siglip"))
    vae = models.get("vae")
    size = model.siglip.image_size
    side = latent_side(size, VAEConfig.from_hf(vae) if vae else None)
    return Loader(
        config,
        *read_processors(files, model.siglip),
        image_size=size,
        latent_tokens=model.gen_encoder.tokens_along(side) ** 2,
        cache=cache,
        **share,
    )


def _begin_worker(loader: Loader) -> None:
    global _loader
    jax.config.update("jax_platforms", "cpu")  # The accelerator is the main process's.
    _loader = loader


def _make_piece(job: int, start: int) -> _Piece:
    return _loader._make_piece(job, start)


def check_broken(broken: list[str], samples: int, limit: float) -> None:
    """Raises ValueError, with a list, where more than a share `limit` of samples is broken."""
    if len(broken) > limit * max(samples, _BROKEN_FLOOR):
        different = sorted(set(broken))
        listed = "\n  ".join(different[:_BROKEN_LISTED])
        more = len(different) - _BROKEN_LISTED
        raise ValueError(
            f"{len(broken)} of {samples} samples come from broken records, more than "
            f"max_broken_share {limit:.2%} allows: repair them, or raise it.\n  {listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
