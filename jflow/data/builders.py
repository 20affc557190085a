"""The two embedded datasets as TFDS builders: the `shapes` world, and `digits`, real scans.

Written in TFDS's ArrayRecord files, so that every source of kind "tfds" reads them without
TensorFlow, with the field map (("caption", "captions"),). Features of both:

  image: PNG. captions: several wordings, one is chosen anew in each epoch.
  conversations: turns {"from", "value"}, several questions about the image, in random order.
  record: JSON; of shapes what the scene was made for in GenEval's format (null for a free scene),
    of digits {"digit": 7}.
  index: of the example in its split; files keep another order.
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jflow.data import shapes
from jflow.data.scenes import SPLITS, WIDE, render
from jflow.data.workers import in_processes
from jflow.folders import new_folder

_CAPTIONS, _CONVERSATION, _COLORS = 2, 3, 4  # purposes of `shapes.generator`; 0 and 1 are its own
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGITS_TRAIN = 1437  # of 1797
_OPTIONS = "options"  # where dataset_info.json keeps what a dataset was built with


@dataclass(frozen=True)
class ShapesOptions:
    """size: side of the pictures in pixels. train, seen, unseen: examples of each split.
    captions: of each picture. colored: percent of the longer captions that name colors. rounds: of
    questions about it, of two to six new ones each. relations: percent of the questions of relation
    that are put, see `shapes.conversation`. wide: percent of the training scenes that have more
    colors, see `scenes.pairs`. counting: how many times as often as for another category one is
    made for that."""

    size: int = 32
    train: int = 20_000
    seen: int = 1_000
    unseen: int = 1_000
    captions: int = 4
    colored: int = int(100 * shapes.COLORED_SHARE)
    rounds: int = 2
    relations: int = int(100 * shapes.RELATIONS_SHARE)
    wide: int = 0
    counting: int = 1
    seed: int = 0

    def __post_init__(self):
        if self.counting < 1:
            raise ValueError(f"counting is a number of times, from 1 on, not {self.counting}.")
        for name in ("colored", "relations", "wide"):
            if not 0 <= (percent := getattr(self, name)) <= 100:
                raise ValueError(f"{name} is in percent, from 0 to 100, not {percent}.")


@dataclass(frozen=True)
class DigitsOptions:
    """size: side of the pictures in pixels, to which the scans of 8 x 8 are enlarged."""

    size: int = 32
    seed: int = 0


class _Embedded(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, options: Any, **kwargs: Any):
        self._options = options
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text, size = tfds.features.Text(), self._options.size
        features = {
            "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
            "captions": tfds.features.Sequence(text),
            "conversations": tfds.features.Sequence({"from": text, "value": text}),
            "record": text,
            "index": np.int64,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict({_OPTIONS: asdict(self._options)}),
        )


class Shapes(_Embedded):
    """The world of `scenes` and `shapes`; every example follows from (seed, split, index)."""

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        make = partial(_shapes_example, self._options, split)
        return enumerate(in_processes(make, range(getattr(self._options, split))))


def _shapes_example(options: ShapesOptions, split: str, index: int) -> dict[str, Any]:
    generator = partial(shapes.generator, options.seed, split, index)
    colored, trained_on = options.colored / 100, split == "train"
    of = WIDE if trained_on and generator(_COLORS).random() < options.wide / 100 else split
    counting = options.counting if trained_on else 1
    made = shapes.example(options.seed, split, index, colored, of, counting)
    rng = generator(_CAPTIONS)
    more = (
        shapes.caption_of(made.scene, made.record, rng, colored) for _ in range(1, options.captions)
    )
    rng = generator(_CONVERSATION)
    asked = shapes.conversation(made.scene, of, options.rounds, rng, options.relations / 100)
    return _example(
        np.round((render(made.scene, options.size) + 1) * 127.5).astype(np.uint8),
        [made.caption, *more],
        [(q.question, q.answer) for q in asked],
        made.record,
        index,
    )


class Digits(_Embedded):
    """1,797 handwritten digits (UCI ML; Alpaydin and Kaynak 1998), as scikit-learn ships them.

    Splits "train" and, held out, "test": the last fifth in the file's own order, unshuffled, so
    that scans of one hand that stand together are not on both sides.
    """

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        scans, labels = load_scans()
        return {
            "train": self._generate_examples(scans, labels, range(_DIGITS_TRAIN)),
            "test": self._generate_examples(scans, labels, range(_DIGITS_TRAIN, len(scans))),
        }

    def _generate_examples(
        self, scans: np.ndarray, labels: np.ndarray, indices: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in indices:
            rng = np.random.default_rng((self._options.seed, i))
            digit = int(labels[i])
            yield (
                i,
                _example(
                    enlarge(scans[i], self._options.size),
                    digit_captions(digit),
                    digit_questions(digit, rng),
                    {"digit": digit},
                    i,
                ),
            )


def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans [1797, 8, 8] float64, ink from 0 to 16, and their digits [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "digits comes with scikit-learn, which is missing: pip install 'jflow[digits]'."
        ) from error
    data = load_digits()
    return data.images, data.target


def enlarge(scan: np.ndarray, size: int) -> np.ndarray:
    """Ink 0 to 16 of [8, 8] -> white on black, uint8 [size, size, 3]."""
    grey = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    return np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC).convert("RGB"))


def digit_captions(digit: int) -> list[str]:
    word = _DIGITS[digit]
    article = "an" if word == "eight" else "a"
    return [
        f"a handwritten {word}",
        f"a photo of the digit {digit}",
        f"the number {word} written by hand",
        f"{article} {word} in white on black",
    ]


def digit_questions(digit: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions with their answers, in random order; half of the guesses are right."""
    others = [d for d in range(10) if d != digit]
    guess = digit if rng.random() < 0.5 else int(rng.choice(others))
    asked = [
        ("Which digit is this?", _DIGITS[digit]),
        ("Is the digit even or odd?", "odd" if digit % 2 else "even"),
        (f"Is this the digit {_DIGITS[guess]}?", "yes" if guess == digit else "no"),
    ]
    return [asked[i] for i in rng.permutation(len(asked))]


def _example(
    pixels: np.ndarray,
    captions: list[str],
    questions: list[tuple[str, str]],
    record: dict | None,
    index: int,
) -> dict[str, Any]:
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "PNG")
    image.seek(0)
    turns = []
    for question, answer in questions:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {
        "image": image,
        "captions": captions,
        "conversations": turns,
        "record": json.dumps(record),
        "index": index,
    }


def build(name: str, options: ShapesOptions | DigitsOptions, folder: Path) -> bool:
    """Writes a dataset into a folder, which a source of kind "tfds" takes as its path.

    Nothing is done where the folder holds it already, and False is returned.

    Raises ValueError where the folder holds anything else.
    """
    folder = Path(folder)
    if folder.exists():
        info = folder / "dataset_info.json"
        there = tfds.builder_from_directory(folder).info if info.exists() else None
        if there is None or (there.name, (there.metadata or {}).get(_OPTIONS)) != (
            name,
            asdict(options),
        ):
            raise ValueError(
                f"{folder} holds something else than {name} with these options: remove it, or "
                f"choose another folder."
            )
        return False
    with new_folder(folder) as made:
        builder = {"shapes": Shapes, "digits": Digits}[name](options, data_dir=made.parent / "tfds")
        builder.download_and_prepare()
        os.replace(builder.data_path, made)
    return True
