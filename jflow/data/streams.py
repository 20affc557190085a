"""The endless stream of one task's samples: which record comes when, and what it becomes."""

import dataclasses
import zlib

import grain
import numpy as np

from jflow.data.cache import ImageCache
from jflow.data.examples import (
    Example,
    Format,
    generation_example,
    text_example,
    understanding_example,
)
from jflow.data.mixture import DataConfig, SourceConfig, Task, WindowConfig, interleave
from jflow.data.sources import Source, open_source


class TaskStream:
    """The endless stream of samples of one task; sample `position` is a record of some source.

    cache: of generation alone, see `cache`. configs, sources: what the numbers that `record` gives
    stand for.
    """

    def __init__(
        self, config: DataConfig, task: Task, fmt: Format, cache: ImageCache | None = None
    ):
        self.task: Task = task
        self.window: WindowConfig = getattr(config, task)
        self.configs: list[SourceConfig] = [s for s in config.sources if s.task == task]
        self.sources: list[Source] = [
            open_source(s.kind, s.path, s.split, dict(s.fields), s.image_folder)
            for s in self.configs
        ]
        self._config, self._cache = config, cache
        self._weights = [source.weight for source in self.configs]
        self._formats = [dataclasses.replace(fmt, template=s.template) for s in self.configs]
        if cache is not None:
            cache.check_sources(self.sources)
        self._orders = [
            grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
            for source, seed in zip(
                self.sources, _seeds(config.seed, task, len(self.sources)), strict=True
            )
        ]

    def record(self, position: int) -> tuple[int, int]:
        """(source, index in it) of a sample; every source is shuffled anew in each epoch."""
        which, number = interleave(position, self._weights)
        return which, int(self._orders[which][number])

    def example(self, position: int) -> Example | str:
        """A sample, or "where: why" if its record is broken."""
        return self.make(*self.record(position), position)

    def first_of(self, which: int, count: int) -> list[int]:
        """The records of a source that its first epoch begins with; all of them if it has fewer."""
        return [int(self._orders[which][n]) for n in range(min(count, len(self.sources[which])))]

    def make(self, which: int, index: int, position: int) -> Example | str:
        """What a record becomes as the sample of a position; see `example`."""
        fmt = self._formats[which]
        try:
            source, cached = self.sources[which], None
            record = source[index]
            if self.task == "generation":
                if self._cache is not None:
                    cached = self._cache.image(which, index, record, source.name(index))
                return generation_example(record, fmt, position, cached)
            make = understanding_example if self.task == "understanding" else text_example
            example, limit = make(record, fmt, position), self._config.images_per_row
            if len(example.slots) > limit:
                raise ValueError(f"it has {len(example.slots)} images, images_per_row is {limit}")
            return example
        except (ValueError, FileNotFoundError) as error:
            where = f"{self.sources[which].name(index)}: {error}"
            # Names of files may hold what no terminal can print.
            return where.encode("utf-8", "backslashreplace").decode()

    def window_examples(self, number: int) -> tuple[list[int], list[Example], list[str]]:
        """A window's usable samples, with their positions, and what is broken in it."""
        first = number * self.window.samples
        made = [(p, self.example(p)) for p in range(first, first + self.window.samples)]
        good = [(p, example) for p, example in made if isinstance(example, Example)]
        broken = [reason for _, reason in made if isinstance(reason, str)]
        return [p for p, _ in good], [example for _, example in good], broken


def _seeds(seed: int, task: Task, count: int) -> list[int]:
    """A seed for the shuffle of each source of a task."""
    sequence = np.random.SeedSequence((seed, zlib.crc32(task.encode())))
    return [int(n) for n in sequence.generate_state(count)]
