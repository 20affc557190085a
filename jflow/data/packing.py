"""Several examples a row, each a segment: one run of tokens that see none of another.

Packing looks at one window of examples at a time and fills a fixed number of rows with it, so a
row depends on its window alone and any row can be made without those before it. What does not
fit is left out, and counted; the next epoch's shuffle puts it elsewhere. Paper section 3.4 packs to
4,096 tokens; its way of packing is not stated.
"""

from collections.abc import Sequence

import numpy as np

from jflow.batch import ImageRows, TextRows
from jflow.data.examples import CachedImage, Example


def assign(
    lengths: Sequence[int],
    images: Sequence[int],
    rows: int,
    row_len: int,
    row_images: int,
    row_samples: int,
) -> list[list[int]]:
    """Which examples share a row: as many from the front of the window as fit.

    So what is left out is the end of the window, whatever its length: short and long examples
    have the same chance.

    Args:
      lengths, images: tokens and images of each example; none may be more than a row holds.
      rows: how many there are to fill. row_len, row_images, row_samples: what one row holds at
        most, of tokens, images and examples.

    Returns:
      for each row its examples, in their own order.
    """
    for count in range(len(lengths), 0, -1):
        if sum(lengths[:count]) <= rows * row_len:
            most = row_len, row_images, row_samples
            found = _first_fit(lengths[:count], images[:count], rows, most)
            if found is not None:
                return found
    return [[] for _ in range(rows)]


def _first_fit(
    lengths: Sequence[int], images: Sequence[int], rows: int, most: tuple[int, int, int]
) -> list[list[int]] | None:
    """First fit, the longest first, equals in their order; None unless all fit."""
    found: list[list[int]] = [[] for _ in range(rows)]
    left = [most] * rows  # tokens, images and samples
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, count = lengths[i], images[i]
        fits = (r for r, (t, m, n) in enumerate(left) if length <= t and count <= m and n)
        row = next(fits, None)
        if row is None:
            return None
        found[row].append(i)
        t, m, n = left[row]
        left[row] = t - length, m - count, n - 1
    return [sorted(row) for row in found]


def text_row(
    examples: Sequence[Example], row_len: int, row_images: int, image_size: int, image_tokens: int
) -> TextRows:
    """One row of `TextRows`, without its first axis; empty where there are no examples.

    Args: row_len L and row_images I as in `TextRows`; image_size S; image_tokens N.
    """
    tokens, positions, segments = _tokens(examples, row_len)
    targets = np.full(row_len, -1, np.int32)
    _place([example.targets for example in examples], targets)
    return TextRows(
        tokens=tokens,
        targets=targets,
        positions=positions,
        segment_ids=segments,
        pixels=_pixels(examples, row_images, image_size),
        slots=_slots(examples, row_len, row_images, 1 + image_tokens),
    )


def image_row(
    examples: Sequence[Example],
    sample_ids: Sequence[int],
    row_len: int,
    row_images: int,
    image_size: int,
    image_tokens: int,
    blank: CachedImage | None = None,
) -> ImageRows:
    """One row of `ImageRows`, without its first axis; empty where there are no examples.

    Args: sample_ids, one for each example; blank, with a cache, what stands where no image is; the
    rest as for `text_row`, with G for I.
    """
    tokens, positions, segments = _tokens(examples, row_len)
    ids = np.full(row_images, -1, np.int32)
    ids[: len(examples)] = sample_ids
    moments = features = pixels = None
    if blank is None or blank.with_crop:
        pixels = _pixels(examples, row_images, image_size)
    if blank is not None:
        cached = [e.cached for e in examples] + [blank] * (row_images - len(examples))
        moments = np.stack([image.moments for image in cached])
        if blank.features is not None:
            features = np.stack([image.features for image in cached])
    return ImageRows(
        tokens=tokens,
        positions=positions,
        segment_ids=segments,
        pixels=pixels,
        slots=_slots(examples, row_len, row_images, 1 + image_tokens),
        sample_ids=ids,
        moments=moments,
        features=features,
    )


def _tokens(examples: Sequence[Example], row_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[L] tokens, positions, segment ids: from 1 by example, 0 for padding."""
    tokens, positions, segments = (np.zeros(row_len, np.int32) for _ in range(3))
    _place([example.tokens for example in examples], tokens)
    _place([example.positions for example in examples], positions)
    _place([np.full(len(e.tokens), number) for number, e in enumerate(examples, 1)], segments)
    return tokens, positions, segments


def _place(parts: Sequence[np.ndarray], row: np.ndarray) -> None:
    if parts:
        joined = np.concatenate(parts)
        row[: len(joined)] = joined


def _pixels(examples: Sequence[Example], row_images: int, size: int) -> np.ndarray:
    pixels = np.zeros((row_images, size, size, 3), np.float32)
    _place([example.pixels for example in examples], pixels)
    return pixels


def _slots(examples: Sequence[Example], row_len: int, row_images: int, width: int) -> np.ndarray:
    slots = np.full((row_images, width), row_len, np.int32)
    starts = np.cumsum([0, *(len(example.tokens) for example in examples)])
    _place([e.slots + start for e, start in zip(examples, starts, strict=False)], slots)
    return slots
