"""The position is one integer, processes and threads change nothing, broken records are named."""

import dataclasses
import itertools
import os
import pickle
import socket
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest

from jflow.data import streams
from jflow.data.mixture import (
    DataConfig,
    MixtureConfig,
    SourceConfig,
    WindowConfig,
)
from jflow.data.pipeline import Loader
from jflow.data.streams import TaskStream
from jflow.distributed import gather_texts
from tests.goldens import REPO
from tests.test_data_sources import png, write_lines
from tests.test_examples import PROCESSOR, TOKENIZER, N


def sources(folder) -> tuple[SourceConfig, ...]:
    """Two sources for generation, weighted 3 to 1, two for understanding, one of text."""
    for i in range(8):
        (folder / f"{i}.png").write_bytes(png((30 * i, 99, 0), (24 + 8 * i, 32)))
    pairs = [{"image": f"{i}.png", "caption": [f"picture {i}", f"number {i}"]} for i in range(8)]
    asked = [
        {"image": f"{i}.png", "question": f"which {'x' * i}?", "answer": f"{i}"} for i in range(5)
    ]
    texts = [{"text": " ".join(f"{i} word" for _ in range(3 + 5 * i))} for i in range(6)]
    first = write_lines(folder / "first.jsonl", pairs)
    second = write_lines(folder / "second.jsonl", pairs[:3])
    asked = write_lines(folder / "asked.jsonl", asked)
    return (
        SourceConfig("generation", "jsonl", first, weight=3),
        SourceConfig("generation", "jsonl", second),
        SourceConfig("understanding", "jsonl", asked),
        SourceConfig("understanding", "jsonl", first, template="pretrain"),
        SourceConfig("text", "jsonl", write_lines(folder / "texts.jsonl", texts)),
    )


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        sources=sources(tmp_path),
        mixture=(MixtureConfig(0, 3, 5, 2), MixtureConfig(4, 14, 80, 6)),
        batch_rows=10,
        max_seq_len=384,
        understanding=WindowConfig(8, 3),
        generation=WindowConfig(5, 2),
        text=WindowConfig(7, 2),
        images_per_row=4,
        crops_per_row=3,
        threads=4,
        prefetch=8,
    )


def loader(config, **more) -> Loader:
    return Loader(config, TOKENIZER, PROCESSOR, image_size=16, latent_tokens=4, **more)


def take(config, count, step=0, **more) -> list:
    return list(itertools.islice(loader(config, **more).batches(step), count))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_sources_by_weight_shuffled_anew_each_epoch(config):
    stream = loader(config).streams["generation"]
    records = [stream.record(position) for position in range(4 * 16)]
    assert Counter(which for which, _ in records) == {0: 48, 1: 16}
    first = [index for which, index in records if which == 0]
    epochs = [first[i : i + 8] for i in range(0, 48, 8)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 4
    other = loader(dataclasses.replace(config, seed=1)).streams["generation"]
    assert [other.record(position) for position in range(64)] != records


# Batches.


def test_shapes_and_contents(config):
    for step, (batch, stats) in enumerate(take(config, 6)):
        text, images = (5, 5) if step < 4 else (2, 8)
        assert batch.text.tokens.shape == (text, 384)
        assert batch.text.pixels.shape == (text, 4, 64, 64, 3)
        assert batch.text.slots.shape == (text, 4, 1 + N)
        assert batch.images.tokens.shape == (images, 384)
        assert batch.images.pixels.shape == (images, 3, 16, 16, 3)
        assert batch.images.slots.shape == (images, 3, 5)
        assert 0 < stats.padding < 1 and stats.broken == ()
        # Rows end with an image; of dropped prompts, the segments alone would not tell.
        slots = batch.images.slots
        used = np.where(slots < 384, slots + 1, 0).max((1, 2)).sum()
        used += (batch.text.segment_ids > 0).sum()
        assert np.isclose(stats.padding, 1 - used / (10 * 384))


def test_a_window_is_made_once(config, monkeypatch):
    """Also where its rows fall into several batches, each of which has some of every task."""
    made, original = [], TaskStream.window_examples

    def window_examples(self, number):
        made.append((self, number))  # Loaders of other tests may still be reading ahead.
        return original(self, number)

    monkeypatch.setattr(TaskStream, "window_examples", window_examples)
    rows = WindowConfig(24, 12)
    long = dataclasses.replace(
        config, generation=rows, understanding=rows, mixture=(MixtureConfig(0, 3, 5, 2),)
    )
    whole = loader(long)
    list(itertools.islice(whole.batches(3), 8))
    own = [(stream.task, number) for stream, number in made if stream in whole.streams.values()]
    assert own and len(own) == len(set(own))


def test_rows_are_packed_windows_of_the_stream(config):
    made = loader(config)
    ids = [batch.images.sample_ids for batch, _ in itertools.islice(made.batches(), 4)]
    ids = np.concatenate(ids).reshape(-1, 2 * 3)  # Two rows of a window.
    for window, found in enumerate(ids):
        placed = np.sort(found[found >= 0])
        np.testing.assert_array_equal(placed, 5 * window + np.arange(len(placed)))
    batch = next(made.batches())[0].images
    sample = made.streams["generation"].example(int(batch.sample_ids[0, 0]))
    np.testing.assert_array_equal(batch.pixels[0, 0], sample.pixels[0])
    np.testing.assert_array_equal(batch.tokens[0, : len(sample.tokens)], sample.tokens)


def test_resumed_from_any_step_it_goes_on_as_if_uninterrupted(config):
    whole = take(config, 9)
    for step in (1, 4, 7):
        for (a, _), (b, _) in zip(whole[step:], take(config, 9 - step, step), strict=True):
            assert_same(a, b)


def test_threads_change_nothing(config):
    alone = dataclasses.replace(config, threads=0, prefetch=0)
    for (a, s), (b, t) in zip(take(config, 5), take(alone, 5), strict=True):
        assert_same(a, b)
        assert s == t


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_makes_the_same_global_batch(config, count):
    whole = take(config, 6, row_multiple=6)
    parts = [
        take(config, 6, process_index=i, process_count=count, row_multiple=6) for i in range(count)
    ]
    for step, (batch, stats) in enumerate(whole):
        split = [part[step][0] for part in parts]
        assert_same(batch, jax.tree.map(lambda *leaves: np.concatenate(leaves), *split))
        shares = [part[step][1] for part in parts]
        assert sum(s.samples for s in shares) == stats.samples
        assert sum(s.left_out for s in shares) == stats.left_out
        assert np.isclose(np.mean([s.padding for s in shares]), stats.padding)


def test_rows_that_do_not_divide_are_filled_up_with_empty_ones(config):
    (batch, _), (plain, _) = take(config, 1, row_multiple=4)[0], take(config, 1)[0]
    assert batch.text.tokens.shape[0] == batch.images.tokens.shape[0] == 8
    assert_same(jax.tree.map(lambda leaf: leaf[:5], batch), plain)
    assert (batch.images.segment_ids[5:] == 0).all() and (batch.images.sample_ids[5:] == -1).all()
    with pytest.raises(ValueError, match="multiples of 3 do not divide by 2 processes"):
        loader(config, process_count=2, row_multiple=3)


def test_a_part_without_share_is_none(config):
    for shares, empty in (((1, 0, 1), "images"), ((0, 1, 0), "text")):
        only = dataclasses.replace(config, mixture=(MixtureConfig(0, *shares),))
        batch, _ = take(only, 1)[0]
        assert getattr(batch, empty) is None
        assert getattr(batch, {"images": "text", "text": "images"}[empty]) is not None


def test_every_sample_is_in_a_row_or_counted_as_left_out(config):
    """Four batches hold whole windows of every task here: 20, 12 and 8 rows."""
    crowded = dataclasses.replace(
        config, generation=WindowConfig(9, 2), understanding=WindowConfig(15, 3)
    )
    batches = take(crowded, 4)
    placed = sum((batch.images.sample_ids >= 0).sum() for batch, _ in batches)
    placed += sum(batch.text.segment_ids.max(1).sum() for batch, _ in batches)
    left_out = sum(stats.left_out for _, stats in batches)
    assert sum(stats.samples for _, stats in batches) == 10 * 9 + 4 * 15 + 4 * 7
    assert placed + left_out == 10 * 9 + 4 * 15 + 4 * 7
    assert left_out >= 10 * (9 - 2 * 3) + 4 * (15 - 3 * 4)  # By their images alone.


# Broken records.


@pytest.fixture
def damaged(config, tmp_path):
    """One of 24 generation records has a broken image, another no caption."""
    (tmp_path / "broken.png").write_bytes(png()[:60])
    records = [{"image": f"{i % 8}.png", "caption": f"{i}"} for i in range(22)]
    records += [{"image": "broken.png", "caption": "x"}, {"image": "0.png"}]
    path = write_lines(tmp_path / "damaged.jsonl", records)
    source = SourceConfig("generation", "jsonl", path)
    return dataclasses.replace(
        config,
        sources=(source, *config.sources[2:]),
        mixture=(MixtureConfig(0, 3, 5, 2),),
        max_broken_share=0.1,
        broken_check_steps=1,
    )


def test_broken_records_are_skipped_and_named(damaged):
    batches = take(damaged, 10)  # 25 windows of 5: five epochs and a bit.
    broken = Counter(reason for _, stats in batches for reason in stats.broken)
    path = damaged.sources[0].path
    assert set(broken) == {
        f"{path} line 23: its image cannot be read (image file is truncated)",
        f"{path} line 24: it has no caption, or an empty one",
    }
    assert 10 <= sum(broken.values()) <= 12
    stream = loader(damaged).streams["generation"]
    bad = {p for p in range(125) if isinstance(stream.example(p), str)}
    used = {int(i) for batch, _ in batches for i in batch.images.sample_ids.ravel() if i >= 0}
    assert not bad & used and len(bad) == sum(broken.values())


def test_workers_change_nothing(damaged):
    """Whatever their number and from any step on; what is broken is named in the same order."""
    config = dataclasses.replace(damaged, broken_check_steps=2)
    expected = take(config, 6)
    assert any(stats.broken for _, stats in expected)
    found = take(dataclasses.replace(config, workers=3), 6)
    assert [stats for _, stats in found] == [stats for _, stats in expected]
    later = take(dataclasses.replace(config, workers=1, prefetch=0), 4, step=2)
    for whole in (found, [*found[:2], *later]):
        for (a, _), (b, _) in zip(whole, expected, strict=True):
            assert_same(a, b)


def test_a_worker_does_not_index_the_sources_again(config, monkeypatch):
    made = loader(config)
    ((expected, _),) = itertools.islice(made.batches(), 1)
    monkeypatch.setattr(streams, "open_source", None)
    ((found, _),) = itertools.islice(pickle.loads(pickle.dumps(made)).batches(), 1)
    assert_same(found, expected)


def test_every_process_names_the_same_broken_records(damaged):
    """Two processes step by step, their texts exchanged by hand."""
    damaged = dataclasses.replace(damaged, broken_check_steps=3)
    seen = []
    for index in range(2):
        texts = []
        other = loader(damaged, process_index=1 - index, process_count=2, row_multiple=2)

        def record(text, texts=texts):
            texts.append(text)
            return [text]

        for _ in itertools.islice(other.batches(gather=record), 10):
            pass

        def exchange(text, texts=texts, index=index):
            pair = [text, texts.pop(0)]
            return pair if index == 0 else pair[::-1]

        mine = loader(damaged, process_index=index, process_count=2, row_multiple=2)
        seen.append([s.broken for _, s in itertools.islice(mine.batches(gather=exchange), 10)])
    assert seen[0] == seen[1]
    whole = [reason for _, stats in take(damaged, 10) for reason in stats.broken]
    assert sorted(reason for step in seen[0] for reason in step) == sorted(whole)
    assert [bool(step) for step in seen[0]].count(True) == 4 and len(whole) > 6


def test_processes_with_the_same_rows_name_a_broken_record_once(damaged):
    """Where mesh.tensor joins two of them: same share, same text."""
    found = loader(damaged).batches(gather=lambda text: [text, text])
    for (_, stats), (_, want) in zip(itertools.islice(found, 3), take(damaged, 3), strict=True):
        assert stats == want


def test_the_last_step_is_looked_at_too(damaged):
    """By several processes; one names what is broken as it comes."""
    damaged = dataclasses.replace(damaged, broken_check_steps=100)
    found = itertools.islice(loader(damaged).batches(2, lambda text: [text], last=9), 10)
    several = [stats.broken for _, stats in found]
    assert [bool(named) for named in several] == [True, *[False] * 6, True, False, False]
    alone = [stats.broken for _, stats in itertools.islice(loader(damaged).batches(2), 8)]
    assert sum(alone, ()) == sum(several, ()) and sum(map(bool, alone[1:-1])) >= 2


def test_beyond_the_share_the_run_stops_with_the_list(damaged):
    with pytest.raises(ValueError, match="(?s)max_broken_share 0.20% allows.*line 2[34]: it"):
        take(dataclasses.replace(damaged, max_broken_share=0.002), 10)
    missing = dataclasses.replace(damaged.sources[0], fields=(("caption", "captoin"),))
    missing = dataclasses.replace(
        damaged, sources=(missing, *damaged.sources[1:]), max_broken_share=0.01
    )
    with pytest.raises(ValueError, match="(?s)15 of .* from broken records.*it has no caption"):
        take(missing, 1)


def test_too_many_images_are_named(config):
    tight = dataclasses.replace(config, images_per_row=0, max_broken_share=1.0)
    _, stats = take(tight, 1)[0]
    assert all("it has 1 images, images_per_row is 0" in reason for reason in stats.broken)
    assert len(stats.broken) == 8


def test_failing_storage_stops_the_run_instead(config, monkeypatch):
    def fail(self, index):
        raise PermissionError("no access")

    monkeypatch.setattr("jflow.data.sources.JsonlSource.__getitem__", fail)
    with pytest.raises(PermissionError, match="no access"):
        take(config, 1)


def test_gathering_on_one_process():
    assert gather_texts("né") == ["né"]


def test_gathering_between_two_processes():
    """Real ones: texts of different lengths, one of them empty."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = f"""
import sys, jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("{address}", 2, int(sys.argv[1]), initialization_timeout=60)
from jflow.distributed import gather_texts
assert gather_texts(("né", "longer 中")[int(sys.argv[1])]) == ["né", "longer 中"]
assert gather_texts(("", "x")[int(sys.argv[1])]) == ["", "x"]
"""
    command = [sys.executable, "-c", code]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    both = [subprocess.Popen([*command, str(i)], env=environment, cwd=REPO) for i in range(2)]
    assert [process.wait(timeout=100) for process in both] == [0, 0]


def test_sources_that_are_not_there(tmp_path, config):
    gone = SourceConfig("text", "jsonl", str(tmp_path / "gone.jsonl"))
    with pytest.raises(FileNotFoundError, match="There is no .jsonl file at .*gone.jsonl"):
        loader(dataclasses.replace(config, sources=(*config.sources, gone)))
