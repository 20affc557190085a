"""A contact sheet: pictures as the model sees them, above texts with the learned part marked."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jflow.data.examples import Example
from jflow.images import ImageProcessor, to_uint8
from jflow.prompts import Tokenizer

CELL = 300  # pixels, the width of a sample with its text
_PICTURE, _GAP, _LINE, _MOST_LINES, _MOST_CHARS = 192, 10, 15, 16, 240
# Read only; learned (an answer, its EOS, a document); hidden (what stands for a dropped prompt).
_COLORS = {"read": "#555555", "learned": "#c00000", "hidden": "#b8b8b8"}


@dataclass(frozen=True)
class Sheet:
    """One row of the sheet: a heading and its samples' (pictures [S, S, 3] uint8, runs of text)."""

    heading: str
    samples: Sequence[tuple[list[np.ndarray], list[tuple[str, str]]]]


def text_runs(example: Example, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """[(kind of `_COLORS`, text)] of an example's tokens, special ones in square brackets."""
    learned = np.append(False, example.targets[:-1] >= 0)
    kinds = np.where(learned, "learned", "read")
    names = {
        tokenizer.bos_id: "[begin]",
        tokenizer.eos_id: "[end]",
        tokenizer.image_id: "[image: {} tokens]",
        tokenizer.image_start_id: "[image start]",
        tokenizer.image_end_id: "[image end]",
    }
    names_of = [names.get(int(token), "") for token in example.tokens]
    vectors = len(example.tokens)
    if example.targets.max(initial=-1) < 0:  # To generate: vectors follow the prompt.
        vectors = int(example.slots.min())
    runs, start = [], 0
    for i in range(1, vectors + 1):
        if i == vectors or (kinds[i], names_of[i]) != (kinds[start], names_of[start]):
            text = names_of[start].format(i - start) or tokenizer.decode(example.tokens[start:i])
            runs.append((str(kinds[start]), text))
            start = i
    if hidden := int(np.max(np.diff(example.positions), initial=1)) - 1:
        runs.append(("hidden", f"[dropped: {hidden} tokens]"))
    if vectors < len(example.tokens):
        runs.append(("read", f"[time] [picture: {len(example.tokens) - vectors - 1} tokens]"))
    return runs


def pictures(example: Example, processor: ImageProcessor | None) -> list[np.ndarray]:
    """uint8 [S, S, 3] of what SigLIP or, without a processor, the VAE is given."""
    pixels = example.pixels
    if processor is not None and processor.do_normalize:
        seen = pixels * np.float32(processor.image_std) + np.float32(processor.image_mean)
        pixels = 2 * seen - 1
    return [to_uint8(picture) for picture in pixels]


def draw(sheets: Sequence[Sheet]) -> np.ndarray:
    """uint8 [H, W, 3]: a row for each sheet; red is what is learned, pale what is hidden."""
    rows = [_draw_row(sheet) for sheet in sheets]
    page = np.full((sum(map(len, rows)), max(row.shape[1] for row in rows), 3), 255, np.uint8)
    top = 0
    for row in rows:
        page[top : top + len(row), : row.shape[1]] = row
        top += len(row)
    return page


def _draw_row(sheet: Sheet) -> np.ndarray:
    font = ImageFont.load_default(12)
    lines = [_wrap(runs, font) for _, runs in sheet.samples]
    texts = _LINE * max(map(len, lines), default=0)
    images = _PICTURE if any(found for found, _ in sheet.samples) else 0
    size = (_GAP + (CELL + _GAP) * max(len(lines), 2), 3 * _GAP + _LINE + images + texts)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    pen.text((_GAP, _GAP), sheet.heading, "black", ImageFont.load_default(13))
    for column, ((found, _), wrapped) in enumerate(zip(sheet.samples, lines, strict=True)):
        left, top = _GAP + column * (CELL + _GAP), 2 * _GAP + _LINE
        for number, picture in enumerate(found[:3]):  # Further ones would not fit: overlapping.
            shown = Image.fromarray(picture)
            shown = shown.resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST)
            page.paste(shown, (left + number * (CELL - _PICTURE) // 2, top))
        for i, line in enumerate(wrapped):
            x = float(left)
            for kind, word in line:
                pen.text((x, top + images + i * _LINE), word, _COLORS[kind], font)
                x += font.getlength(word)
    return np.asarray(page)


def _words(text: str, font: ImageFont.FreeTypeFont) -> Iterator[str]:
    """With the space behind them; what is wider than a cell, as Chinese is, in pieces."""
    for word in text.split():
        while (width := font.getlength(word)) > CELL:
            fitting = max(int(len(word) * CELL / width) - 1, 1)
            yield word[:fitting]
            word = word[fitting:]
        yield word + " "


def _wrap(runs: Sequence[tuple[str, str]], font: ImageFont.FreeTypeFont) -> list[list]:
    """Lines of [(kind, word)] no wider than a cell; long runs lose their middle."""
    lines: list[list[tuple[str, str]]] = [[]]
    width = 0.0
    for kind, text in runs:
        if len(text) > _MOST_CHARS:
            text = f"{text[: _MOST_CHARS // 3]} ... {text[-_MOST_CHARS // 2 :]}"
        for word in _words(text, font):
            if width + font.getlength(word) > CELL and lines[-1]:
                lines.append([])
                width = 0.0
            lines[-1].append((kind, word))
            width += font.getlength(word)
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], [("read", "...")]]
    return lines
