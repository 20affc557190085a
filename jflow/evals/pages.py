"""Pages for people: drawn pictures above their prompts, and questions with the model's answers."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jflow.evals.benchmark import Answered, Drawn
from jflow.evals.detector import detect
from jflow.evals.geneval import judge
from jflow.images import to_uint8

_SIDE, _GAP, _LINE, _FONT = 128, 12, 15, 12
_COLORS = {True: "#187a2c", False: "#c00000"}


def drawing_page(drawn: Drawn, columns: int = 6, rows: int = 4) -> np.ndarray:
    """uint8 [H, W, 3]: pictures above their prompts, green where nothing is wrong with them.

    A column holds one category where `columns` is their number.
    """
    cells = []
    for picture, record in list(zip(drawn.pictures, drawn.records, strict=True))[: columns * rows]:
        _, strict = judge(detect(picture), record)
        cells.append((to_uint8(picture), [(record["prompt"].removeprefix("a photo of "), strict)]))
    return _page(cells, columns)


def answer_page(answered: Answered, columns: int = 6, rows: int = 2) -> np.ndarray:
    """uint8 [H, W, 3]: pictures above what was asked about them, wrong answers in red."""
    cells: list[tuple[np.ndarray, list[tuple[str, bool]]]] = []
    for question, picture, answer in zip(
        answered.questions, answered.pictures, answered.answers, strict=True
    ):
        if not cells or cells[-1][0] is not picture:
            cells.append((picture, []))
        cells[-1][1].append((f"{question.question} {answer}", answer == question.answer))
    return _page(cells[: columns * rows], columns)


def _page(cells: Sequence[tuple[np.ndarray, list[tuple[str, bool]]]], columns: int) -> np.ndarray:
    font = ImageFont.load_default(_FONT)
    wrapped = [
        [(line, good) for text, good in texts for line in _wrap(text, font)] for _, texts in cells
    ]
    height = _SIDE + _LINE * max(map(len, wrapped)) + 2 * _GAP
    rows = -(-len(cells) // columns)
    size = (_GAP + columns * (_SIDE + _GAP), _GAP + rows * height)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for i, ((picture, _), lines) in enumerate(zip(cells, wrapped, strict=True)):
        left, top = _GAP + i % columns * (_SIDE + _GAP), _GAP + i // columns * height
        shown = Image.fromarray(picture).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        page.paste(shown, (left, top))
        for n, (line, good) in enumerate(lines):
            pen.text((left, top + _SIDE + 3 + n * _LINE), line, _COLORS[good], font)
    return np.asarray(page)


def _wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > _SIDE:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
