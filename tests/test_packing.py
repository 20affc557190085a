"""Packed rows hold exactly their examples; nothing that does not fit gets in."""

import numpy as np
import pytest

from jflow.data.examples import Example
from jflow.data.packing import assign, image_row, text_row

L, S, N = 40, 4, 3


def example(rng, length, images=1, dropped=False) -> Example:
    positions = np.arange(length, dtype=np.int32)
    if dropped:
        positions[1:] += 2
    starts = np.sort(rng.choice(length // (1 + N), images, replace=False)) * (1 + N)
    return Example(
        tokens=rng.integers(5, 99, length).astype(np.int32),
        targets=rng.integers(-1, 99, length).astype(np.int32),
        positions=positions,
        pixels=rng.random((images, S, S, 3), np.float32),
        slots=(starts[:, None] + np.arange(1 + N)).astype(np.int32),
    )


@pytest.mark.parametrize("seed", range(20))
def test_as_many_from_the_front_as_fit(seed):
    rng = np.random.default_rng(seed)
    lengths, images = rng.integers(1, L + 1, 30), rng.integers(0, 3, 30)
    rows, most, samples = (int(rng.integers(*ends)) for ends in ((1, 9), (2, 6), (2, 6)))
    found = assign(lengths.tolist(), images.tolist(), rows, L, most, samples)
    assert len(found) == rows
    for row in found:
        assert row == sorted(row)
        assert lengths[row].sum() <= L and images[row].sum() <= most and len(row) <= samples
    placed = sorted(i for row in found for i in row)
    assert placed == list(range(len(placed)))  # The front of the window, each once.
    again = assign(lengths[: len(placed) + 1].tolist(), images.tolist(), rows, L, most, samples)
    assert sum(map(len, again)) == len(placed)


def test_a_perfect_fit_is_found():
    assert assign([10, 30, 20, 20], [0] * 4, 2, L, 0, 9) == [[0, 1], [2, 3]]
    assert assign([20, 20, 20], [1, 1, 1], 3, L, 1, 9) == [[0], [1], [2]]
    assert assign([10, 10, 10], [0] * 3, 2, L, 0, 2) == [[0, 1], [2]]
    assert assign([], [], 2, L, 1, 9) == [[], []]


@pytest.mark.parametrize("seed", range(5))
def test_text_rows_equal_their_samples(seed):
    rng = np.random.default_rng(seed)
    samples = [example(rng, n, k) for n, k in ((12, 2), (9, 0), (14, 1))]
    row = text_row(samples, L, 5, S, N)
    start, image = 0, 0
    for number, sample in enumerate(samples, 1):
        here = slice(start, start + len(sample.tokens))
        np.testing.assert_array_equal(row.tokens[here], sample.tokens)
        np.testing.assert_array_equal(row.targets[here], sample.targets)
        np.testing.assert_array_equal(row.positions[here], np.arange(len(sample.tokens)))
        np.testing.assert_array_equal(row.segment_ids[here], number)
        for pixels, slots in zip(sample.pixels, sample.slots, strict=True):
            np.testing.assert_array_equal(row.pixels[image], pixels)
            np.testing.assert_array_equal(row.tokens[row.slots[image]], sample.tokens[slots])
            assert here.start <= row.slots[image].min() and row.slots[image].max() < here.stop
            image += 1
        start = here.stop
    assert (row.segment_ids[start:] == 0).all() and (row.targets[start:] == -1).all()
    assert image == 3 and (row.slots[3:] == L).all() and (row.pixels[3:] == 0).all()
    assert row.pixels.shape == (5, S, S, 3) and row.slots.shape == (5, 1 + N)


def test_image_rows_keep_the_positions_behind_dropped_prompts():
    rng = np.random.default_rng(0)
    samples = [example(rng, 12), example(rng, 10, dropped=True), example(rng, 8)]
    row = image_row(samples, [70, 71, 75], L, 4, S, N)
    np.testing.assert_array_equal(row.segment_ids[:30], np.repeat([1, 2, 3], [12, 10, 8]))
    positions = [*range(12), 0, *range(3, 12), *range(8)]
    np.testing.assert_array_equal(row.positions[:30], positions)
    np.testing.assert_array_equal(row.sample_ids, [70, 71, 75, -1])
    for i, (sample, start) in enumerate(zip(samples, (0, 12, 22), strict=True)):
        np.testing.assert_array_equal(row.slots[i], sample.slots[0] + start)
        np.testing.assert_array_equal(row.pixels[i], sample.pixels[0])
    assert (row.slots[3] == L).all()


def test_types_and_empty_rows():
    for row in (text_row([], L, 2, S, N), image_row([], [], L, 2, S, N)):
        assert (row.segment_ids == 0).all() and (row.slots == L).all() and (row.pixels == 0).all()
        for name, values in vars(row).items():
            if name in ("moments", "features"):
                assert values is None  # without a cache
            else:
                assert values.dtype == (np.float32 if name == "pixels" else np.int32), name
    assert (text_row([], L, 2, S, N).targets == -1).all()
    assert (image_row([], [], L, 2, S, N).sample_ids == -1).all()
    assert text_row([], L, 0, S, N).pixels.shape == (0, S, S, 3)
