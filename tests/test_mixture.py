"""The mixture is exact in every batch and over many, without reading anything."""

import dataclasses
from collections import Counter

import pytest

from jflow.data.mixture import (
    TASKS,
    DataConfig,
    MixtureConfig,
    SourceConfig,
    WindowConfig,
    batch_rows,
    count_streams,
    interleave,
    part_sizes,
)

RECIPE = (MixtureConfig(0, 30, 50, 20), MixtureConfig(10_000, 14, 80, 6))
PAPER = DataConfig(sources=tuple(SourceConfig(task, "jsonl", "x") for task in TASKS))


def test_defaults_are_the_paper_s():
    assert PAPER.mixture == RECIPE and PAPER.batch_rows == 512 and PAPER.max_seq_len == 4096


def test_the_mix_over_1000_batches_is_exact():
    for start, shares in ((0, (50, 30, 20)), (10_000, (80, 14, 6))):
        rows = [row for step in range(start, start + 1000) for row in batch_rows(PAPER, step)]
        counts = Counter(row.task for row in rows)
        assert len(rows) == 512_000
        assert [counts[task] for task in TASKS] == [5120 * share for share in shares]


def test_every_batch_is_within_a_row_of_its_shares_and_its_shape():
    for step in (*range(100), *range(9_950, 10_100)):
        counts = Counter(row.task for row in batch_rows(PAPER, step))
        shares = (256, 153.6, 102.4) if step < 10_000 else (409.6, 71.68, 30.72)
        assert abs(counts["generation"] - shares[0]) < 1
        assert abs(counts["understanding"] - shares[1]) < 2
        assert abs(counts["text"] - shares[2]) < 2
        text, images = part_sizes(PAPER, step, 1)
        assert (text, images) == ((256, 256) if step < 10_000 else (103, 410))
        assert counts["generation"] <= images and sum(counts.values()) - images <= text


def test_rows_of_a_task_are_numbered_without_gap_through_the_phases():
    shares = (MixtureConfig(0, 3, 5, 2), MixtureConfig(4, 14, 80, 6))
    config = dataclasses.replace(PAPER, mixture=shares, batch_rows=10)
    rows = [row for step in range(12) for row in batch_rows(config, step)]
    for task in TASKS:
        numbers = [row.number for row in rows if row.task == task]
        assert numbers == list(range(len(numbers)))
    shares = [Counter(row.task for row in batch_rows(config, step)) for step in range(4)]
    assert shares == [{"generation": 5, "understanding": 3, "text": 2}] * 4


@pytest.mark.parametrize(
    "weights", [(1,), (3, 1), (50, 30, 20), (80, 14, 6), (0, 2, 0, 5), (7, 2, 1)]
)
def test_interleaving_is_exact_and_numbers_each_stream(weights):
    seen = [0] * len(weights)
    for position in range(3 * sum(weights)):
        which, number = interleave(position, weights)
        assert number == seen[which]
        seen[which] += 1
        assert abs(seen[0] - (position + 1) * weights[0] / sum(weights)) < 1
    assert seen == [3 * weight for weight in weights]
    assert count_streams(10**12 * sum(weights), weights) == [10**12 * w for w in weights]


# Configs that make no sense.


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mixture": ()}, "must start at step 0"),
        ({"mixture": RECIPE[1:]}, "must start at step 0"),
        ({"mixture": RECIPE[::-1]}, "must start at step 0"),
        ({"mixture": (MixtureConfig(0, 0, 0, 0),)}, "not all of them 0"),
        ({"mixture": (MixtureConfig(0, -1, 2, 0),)}, "at least 0"),
        ({"sources": ()}, "a share of generation, but no source"),
        ({"batch_rows": 0}, "batch_rows must be at least 1"),
        ({"broken_check_steps": 0}, "broken_check_steps must be at least 1"),
        ({"max_seq_len": 0}, "data.max_seq_len must be at least 1"),
        ({"samples_per_row": 0}, "data.samples_per_row must be at least 1"),
        ({"crops_per_row": 0}, "data.crops_per_row must be at least 1"),
        ({"threads": -1}, "data.threads must be at least 0"),
        ({"workers": -1}, "data.workers must be at least 0"),
    ],
)
def test_configs_without_sense(change, reason):
    with pytest.raises(ValueError, match=reason):
        dataclasses.replace(PAPER, **change)


def test_more_parts_than_rows_are_refused():
    with pytest.raises(ValueError, match="512 rows cannot be cut into 1024 parts"):
        part_sizes(PAPER, 0, 1024)
    with pytest.raises(ValueError, match="at least 1 of each"):
        WindowConfig(8, 0)


def test_sources_without_sense():
    with pytest.raises(ValueError, match="There is no task 'gen': use one of generation, "):
        SourceConfig("gen", "jsonl", "x")
    with pytest.raises(ValueError, match="There is no template 'sft'"):
        SourceConfig("text", "jsonl", "x", template="sft")
    with pytest.raises(ValueError, match="weight of x must be a whole number"):
        SourceConfig("text", "jsonl", "x", weight=0)
