"""What a config will train on, told before paying for it: counts, lengths, waste, bad records.

Reads the first records of every source's first epoch, in the order in which training would, and
turns them into examples exactly as training does.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from jflow import checkpoints
from jflow.data import contact, packing
from jflow.data.encode import open_cache
from jflow.data.examples import Example, Format, cached_crop
from jflow.data.mixture import TASKS, DataConfig, batch_rows
from jflow.data.pipeline import checkpoint_loader
from jflow.data.streams import TaskStream
from jflow.images import save_png
from jflow.models.janusflow import JanusFlowConfig
from jflow.training.config import TrainConfig

SHEET, REPORT = "contact_sheet.png", "check.json"
_SHOWN = 4  # samples of each source on the contact sheet
_LISTED = 20  # broken records of each source in the printed report; all are in the file
_LEFT_OUT = 0.1  # share of a task's samples that are left out, from which it is worth a warning


@dataclass(frozen=True)
class SourceReport:
    """Of the good records: tokens, the min, mean, median, 95th percentile and max of their number;
    images, their mean number; largest_id, that of a token which is no place for an image; shown,
    of the samples on the contact sheet, runs of text and whether they are learned."""

    source: str
    task: str
    records: int
    read: int
    tokens: dict[str, float]
    images: float
    largest_id: int
    shown: tuple[list[tuple[str, str]], ...]
    broken: tuple[str, ...]


@dataclass(frozen=True)
class PackingReport:
    """Of `windows` windows: share of positions that hold nothing, and of samples left out. full:
    the field of DataConfig whose number most rows reach, or ""."""

    task: str
    windows: int
    samples: int
    padding: float
    left_out: float
    samples_per_row: float
    full: str


@dataclass(frozen=True)
class MixtureReport:
    """From a step on: rows of each task in `batches` batches, and samples of each in one batch."""

    from_step: int
    batches: int
    rows: dict[str, int]
    samples_per_batch: dict[str, float]


@dataclass(frozen=True)
class Report:
    sources: tuple[SourceReport, ...]
    packing: tuple[PackingReport, ...]
    mixture: tuple[MixtureReport, ...]
    warnings: tuple[str, ...]
    errors: tuple[str, ...]


def check(config: TrainConfig, out: Path, records: int, windows: int, batches: int) -> Report:
    """Examines a config's data, and writes REPORT and the contact sheet into `out`.

    Args:
      records: of each source to read at most; windows: of each task to pack; batches: of each
        phase of the mixture whose rows are counted, at most.

    Raises FileNotFoundError or ValueError in one sentence for what keeps training from starting.
    """
    models, files = checkpoints.read_metadata(config.init_from)
    cache = None
    if config.data.cache:  # Its checksums need the parameters.
        params, *_ = checkpoints.load_checkpoint(config.init_from)
        cache = open_cache(config, params, models)
    loader = checkpoint_loader(config.data, models, files, cache)
    sources, sheets = [], []
    for stream in loader.streams.values():
        for which in range(len(stream.sources)):
            report, sheet = _check_source(stream, which, loader.format, records, config.data)
            sources.append(report)
            sheets.append(sheet)
    packed = tuple(_check_packing(s, config.data, windows) for s in loader.streams.values())
    starts = [phase.from_step for phase in config.data.mixture]
    mixture = tuple(
        _check_mixture(config.data, start, min(batches, end - start), packed)
        for start, end in pairwise([*starts, starts[-1] + batches])
    )
    vocabulary = JanusFlowConfig.from_hf(models["janusflow"], models.get("siglip")).language
    errors = _errors(sources, packed, config.data, vocabulary.vocab_size)
    report = Report(tuple(sources), packed, mixture, _warnings(packed), errors)
    out.mkdir(parents=True, exist_ok=True)
    if sheets := [sheet for sheet in sheets if sheet.samples]:
        save_png(contact.draw(sheets), out / SHEET, {})
    partial = out / f".{REPORT}.tmp"
    partial.write_text(
        json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False), encoding="utf-8"
    )
    os.replace(partial, out / REPORT)
    return report


def _examples(
    stream: TaskStream, which: int, indices: list[int], threads: int
) -> Iterator[Example | str]:
    """In the order of the indices; few at a time, as pictures are large."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(indices), 4 * threads):
            part = indices[start : start + 4 * threads]
            yield from pool.map(lambda i: stream.make(which, i, i), part)


def _check_source(
    stream: TaskStream, which: int, fmt: Format, records: int, data: DataConfig
) -> tuple[SourceReport, contact.Sheet]:
    config, source = stream.configs[which], stream.sources[which]
    indices = stream.first_of(which, records)
    processor = None if stream.task == "generation" else fmt.processor
    lengths, images, broken, samples, largest = [], [], [], [], 0
    for index, made in zip(indices, _examples(stream, which, indices, data.pool_size), strict=True):
        if isinstance(made, str):
            broken.append(made)
            continue
        lengths.append(len(made.tokens))
        images.append(len(made.slots))
        largest = max(largest, int(np.delete(made.tokens, made.slots.ravel()).max(initial=0)))
        if len(samples) < _SHOWN:
            if made.cached is not None and not len(made.pixels):
                crop = cached_crop(source[index], fmt.image_size, data.seed, index)
                made = dataclasses.replace(made, pixels=crop)
            runs = contact.text_runs(made, fmt.tokenizer)
            samples.append((contact.pictures(made, processor), runs))
    name = f"{config.path} {config.split}" if config.kind == "tfds" else config.path
    report = SourceReport(
        source=name,
        task=stream.task,
        records=len(source),
        read=len(indices),
        tokens=_summary(lengths),
        images=float(np.mean(images)) if images else 0.0,
        largest_id=largest,
        shown=tuple(runs for _, runs in samples),
        broken=tuple(broken),
    )
    return report, contact.Sheet(f"{stream.task}: {name}, template {config.template}", samples)


def _summary(lengths: list[int]) -> dict[str, float]:
    if not lengths:
        return {}
    median, high = np.percentile(lengths, [50, 95])
    return {
        "min": min(lengths),
        "mean": float(np.mean(lengths)),
        "p50": float(median),
        "p95": float(high),
        "max": max(lengths),
    }


def _check_packing(stream: TaskStream, config: DataConfig, windows: int) -> PackingReport:
    """Packs the first windows, as the loader would."""
    limit = "crops_per_row" if stream.task == "generation" else "images_per_row"
    most = getattr(config, limit)
    tokens = placed = made = 0
    full = Counter()
    with ThreadPoolExecutor(config.pool_size) as pool:
        for number in range(windows):
            first = number * stream.window.samples
            positions = range(first, first + stream.window.samples)
            sizes = [
                (len(e.tokens), len(e.slots))
                for e in pool.map(stream.example, positions)
                if isinstance(e, Example)
            ]
            lengths, images = [n for n, _ in sizes], [n for _, n in sizes]
            rows = packing.assign(
                lengths,
                images,
                stream.window.rows,
                config.max_seq_len,
                most,
                config.samples_per_row,
            )
            made += len(sizes)
            placed += sum(map(len, rows))
            tokens += sum(lengths[i] for row in rows for i in row)
            full["samples_per_row"] += sum(len(row) == config.samples_per_row for row in rows)
            full[limit] += sum(sum(images[i] for i in row) >= most > 0 for row in rows)
    (most_often, count), *_ = full.most_common()
    rows = windows * stream.window.rows
    return PackingReport(
        task=stream.task,
        windows=windows,
        samples=made,
        padding=1 - tokens / (rows * config.max_seq_len),
        left_out=1 - placed / made if made else 0.0,
        samples_per_row=placed / rows,
        full=most_often if 2 * count > rows else "",
    )


def _check_mixture(
    config: DataConfig, from_step: int, batches: int, packed: tuple[PackingReport, ...]
) -> MixtureReport:
    counts = dict.fromkeys(TASKS, 0)
    for step in range(from_step, from_step + batches):
        for row in batch_rows(config, step):
            counts[row.task] += 1
    per_row = {report.task: report.samples_per_row for report in packed}
    samples = {
        task: rows / batches * per_row[task] for task, rows in counts.items() if task in per_row
    }
    return MixtureReport(from_step, batches, counts, samples)


def _warnings(packed: tuple[PackingReport, ...]) -> tuple[str, ...]:
    found = []
    for report in packed:
        first = f"raise data.{report.full}, which most rows reach, or " if report.full else ""
        if report.left_out > _LEFT_OUT:
            found.append(
                f"{report.left_out:.0%} of the {report.task} samples find no place: {first}take "
                f"fewer samples or more rows in data.{report.task}."
            )
        elif report.padding > 0.25:
            found.append(
                f"{report.padding:.0%} of the {report.task} rows are padding: {first}take more "
                f"samples in data.{report.task}, or another max_seq_len."
            )
    return tuple(found)


def _errors(
    sources: list[SourceReport],
    packed: tuple[PackingReport, ...],
    config: DataConfig,
    vocab_size: int,
) -> tuple[str, ...]:
    found = []
    for report in sources:
        if report.largest_id >= vocab_size:
            found.append(
                f"The tokenizer makes token {report.largest_id} of {report.source}, but the model "
                f"has only {vocab_size}: it is another model's tokenizer."
            )
        if len(report.broken) > config.max_broken_share * report.read:
            found.append(
                f"{len(report.broken)} of {report.read} records of {report.source} cannot be used "
                f"for {report.task}, more than max_broken_share {config.max_broken_share:.2%} "
                f"allows: repair or remove them."
            )
    for report in packed:
        if report.samples and not report.samples_per_row:
            found.append(f"No sample of {report.task} fits into a row: raise data.max_seq_len.")
    return tuple(found)


def describe(report: Report) -> str:
    """The report as text for a terminal."""
    lines = []
    for one in report.sources:
        lines.append(f"{one.task}: {one.source}")
        lines.append(f"  records {one.records:,}, read {one.read:,}, broken {len(one.broken):,}")
        if one.tokens:
            numbers = "  ".join(f"{name} {value:,.0f}" for name, value in one.tokens.items())
            lines.append(f"  tokens: {numbers}; images: mean {one.images:.2f}")
        lines += [f"  broken: {reason}" for reason in one.broken[:_LISTED]]
        if len(one.broken) > _LISTED:
            lines.append(f"  and {len(one.broken) - _LISTED} more, see {REPORT}")
    lines.append("")
    for one in report.packing:
        lines.append(
            f"packing {one.task}: {one.padding:.1%} padding, {one.left_out:.1%} of the samples "
            f"left out, {one.samples_per_row:.1f} samples a row ({one.windows} windows)"
        )
    for one in report.mixture:
        total = sum(one.rows.values())
        rows = ", ".join(f"{task} {n / total:.2%}" for task, n in one.rows.items() if n)
        samples = ", ".join(f"{task} {n:.1f}" for task, n in one.samples_per_batch.items() if n)
        lines.append(
            f"mixture from step {one.from_step:,}: rows {rows} over {one.batches} batches; "
            f"samples a batch: {samples}"
        )
    lines += [f"warning: {text}" for text in report.warnings]
    return "\n".join(lines)
