"""From configured sources to batches: exact mixture, packing, split by process, prefetch.

Every row of every batch follows from (config, step) alone: which task it is for, which window of
that task's samples it packs, which records those are, and all that is random in them. So the
position in the data is one integer, the step, and neither a restart nor another number of
processes changes what is trained on. Each process makes only its own rows.

Grain shuffles each source anew every epoch and makes the windows ahead of time in threads.
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import grain
import jax
import numpy as np

from jflow.batch import Batch, ImageRows, TextRows
from jflow.data import packing
from jflow.data.cache import ImageCache
from jflow.data.examples import Example, Format
from jflow.data.mixture import TASKS, DataConfig, Row, Task, batch_rows, part_sizes
from jflow.data.streams import TaskStream
from jflow.distributed import gather_texts
from jflow.images import ImageProcessor
from jflow.models.janusflow import JanusFlowConfig
from jflow.models.vae import VAEConfig
from jflow.prompts import Tokenizer

_BROKEN_FLOOR = 1_000  # records that the share of broken ones is taken of, at least
_BROKEN_LISTED = 20


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


@dataclass(frozen=True)
class _Piece:
    """What one thread makes of one window: rows, and their places in the process's share."""

    task: Task | None = None
    slots: tuple[int, ...] = ()
    rows: tuple[TextRows | ImageRows, ...] = ()
    tokens: int = 0
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
        self._jobs = functools.lru_cache(maxsize=16)(self._list_jobs)
        starts = [phase.from_step for phase in config.mixture]
        self._jobs_per_step = max(self._most_jobs(step) for step in starts)

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
        self, step: int = 0, gather: Callable[[str], list[str]] | None = None
    ) -> Iterator[tuple[Batch, BatchStats]]:
        """The batches of `step` and all that follow, made ahead of time.

        gather: gives every process's text to every process, at the same step on all of them;
        None for JAX's own collectives. Raises ValueError with the list of broken records once
        they are more than the configured share: on all processes at the same step.
        """
        config, gather = self._config, gather or gather_texts
        options = grain.ReadOptions(config.threads, config.prefetch)
        jobs = grain.MapDataset.range(step * self._jobs_per_step, sys.maxsize)
        pieces = iter(jobs.map(self._make_piece).to_iter_dataset(options))
        samples, new, broken = 0, [], []
        for now in itertools.count(step):
            found = [next(pieces) for _ in range(self._jobs_per_step)]
            new += [reason for piece in found for reason in piece.broken]
            samples += sum(piece.samples for piece in found)
            reported = []
            if (now - step) % config.broken_check_steps == 0:
                texts = [json.loads(text) for text in gather(json.dumps([samples, new]))]
                reported, new = [reason for _, part in texts for reason in part], []
                broken += reported
                _check_broken(broken, sum(n for n, _ in texts), config.max_broken_share)
            yield self._assemble(now, found, tuple(reported))

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

    def _list_jobs(self, step: int) -> list[tuple[Task, int, list[tuple[int, int]]]]:
        """(task, window, [(place in this process's part, row of the window)]) of one step."""
        jobs: dict[tuple[Task, int], list[tuple[int, int]]] = {}
        for part in self.local_rows(step):
            for slot, row in enumerate(part):
                if row is not None:
                    window, inside = divmod(row.number, self.streams[row.task].window.rows)
                    jobs.setdefault((row.task, window), []).append((slot, inside))
        return [(task, window, rows) for (task, window), rows in jobs.items()]

    def _make_piece(self, index: int) -> _Piece:
        step, number = divmod(int(index), self._jobs_per_step)
        jobs = self._jobs(step)
        if number >= len(jobs):
            return _Piece()
        task, window, wanted = jobs[number]
        stream, config = self.streams[task], self._config
        positions, examples, broken = stream.window_examples(window)
        lengths = [len(example.tokens) for example in examples]
        images = [len(example.slots) for example in examples]
        most = config.crops_per_row if task == "generation" else config.images_per_row
        packed = packing.assign(lengths, images, stream.window.rows, config.max_seq_len, most)
        begins = any(inside == 0 for _, inside in wanted)
        return _Piece(
            task=task,
            slots=tuple(slot for slot, _ in wanted),
            rows=tuple(
                self._row(task, [examples[i] for i in row], [positions[i] for i in row])
                for row in (packed[inside] for _, inside in wanted)
            ),
            tokens=sum(lengths[i] for _, inside in wanted for i in packed[inside]),
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
        self, step: int, pieces: list[_Piece], broken: tuple[str, ...]
    ) -> tuple[Batch, BatchStats]:
        sizes = self._sizes(step)
        parts = []
        for size, task in zip(sizes, ("text", "generation"), strict=True):
            made = {
                slot: row
                for piece in pieces
                if (piece.task == "generation") == (task == "generation")
                for slot, row in zip(piece.slots, piece.rows, strict=True)
            }
            rows = [made[i] if i in made else self._row(task, [], []) for i in range(size)]
            parts.append(jax.tree.map(lambda *leaves: np.stack(leaves), *rows) if rows else None)
        stats = BatchStats(
            padding=1 - sum(p.tokens for p in pieces) / (sum(sizes) * self._config.max_seq_len),
            samples=sum(piece.samples for piece in pieces),
            left_out=sum(piece.left_out for piece in pieces),
            broken=broken,
        )
        return Batch(text=parts[0], images=parts[1]), stats


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
    latent_size = size // (VAEConfig.from_hf(vae).downscale if vae else 1)
    return Loader(
        config,
        Tokenizer.from_files(files),
        ImageProcessor.from_files(files),
        image_size=size,
        latent_tokens=model.gen_encoder.tokens_along(latent_size) ** 2,
        cache=cache,
        **share,
    )


def _check_broken(broken: list[str], samples: int, limit: float) -> None:
    if len(broken) > limit * max(samples, _BROKEN_FLOOR):
        different = sorted(set(broken))
        listed = "\n  ".join(different[:_BROKEN_LISTED])
        more = len(different) - _BROKEN_LISTED
        raise ValueError(
            f"{len(broken)} of {samples} samples come from broken records, more than "
            f"max_broken_share {limit:.2%} allows: repair or remove them.\n  {listed}"
            + (f"\n  and {more} more" if more > 0 else "")
        )
