"""The embedded datasets as they are read back: pictures, texts and splits, by other means."""

import io
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from jflow.data import builders, scenes, shapes
from jflow.data.__main__ import main
from jflow.data.sources import open_source

FIELDS = {"caption": "captions"}
COUNTS = {"train": 60, "seen": 20, "unseen": 10}


@pytest.fixture(scope="module")
def shapes_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "shapes"
    counts = [f"--{split}={count}" for split, count in COUNTS.items()]
    assert main(["build", "shapes", f"--out={folder}", "--size=40", "--seed=3", *counts]) == 0
    return folder


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "digits"
    assert main(["build", "digits", f"--out={folder}", "--size=16"]) == 0
    return folder


def rows(folder, split):
    """{index: row}, read by TFDS alone."""
    return {
        int(row["index"]): row for row in tfds.builder_from_directory(folder).as_data_source(split)
    }


def turns(row):
    """[(question, answer)] of a record of `sources`."""
    said = row["conversations"]
    assert [turn["from"] for turn in said] == ["human", "gpt"] * (len(said) // 2)
    values = [turn["value"] for turn in said]
    return list(zip(values[::2], values[1::2], strict=True))


def test_every_shapes_row_follows_from_seed_split_and_index(shapes_folder):
    for split, count in COUNTS.items():
        found = rows(shapes_folder, split)
        assert sorted(found) == list(range(count))
        for i, row in found.items():
            made = shapes.example(3, split, i)
            # Eight bits a channel of [-1, 1].
            drawn = (scenes.render(made.scene, 40) + 1) * 127.5
            assert np.abs(row["image"] - drawn).max() <= 0.51
            assert json.loads(row["record"]) == made.record
            assert row["captions"][0].decode() == made.caption and len(row["captions"]) == 4


def test_a_source_reads_shapes_through_a_field_map(shapes_folder):
    source = open_source("tfds", str(shapes_folder), "train", FIELDS)
    assert len(source) == COUNTS["train"]
    for i in range(COUNTS["train"]):
        record = source[i]
        (image,) = record["images"]
        assert Image.open(io.BytesIO(image)).size == (40, 40) and image[1:4] == b"PNG"
        assert len(record["caption"]) == 4 and len(turns(record)) >= 3


def test_only_the_unseen_split_names_held_out_pairs(shapes_folder):
    held = [(s, c) for s, colors in scenes.HELD_OUT.items() for c in colors]
    named = re.compile("|".join(rf"\b{c} {s}" for s, c in held))

    def texts(split):
        for row in rows(shapes_folder, split).values():
            yield from (t.decode() for t in row["captions"])
            yield from (t.decode() for t in row["conversations"]["value"])

    assert not any(named.search(text) for split in ("train", "seen") for text in texts(split))
    assert any(named.search(text) for text in texts("unseen"))


def test_more_colors_and_counting_are_only_trained_on(tmp_path):
    """In pictures, captions and questions; the held-out splits are as they are without them."""
    counts = ["--train=60", "--seen=5", "--unseen=5"]
    for which, options in {"plain": [], "more": ["--wide=50", "--counting=3"]}.items():
        assert main(["build", "shapes", f"--out={tmp_path / which}", *options, *counts]) == 0
    made = rows(tmp_path / "more", "train").values()
    records = [json.loads(row["record"]) for row in made]
    counted = np.mean([r is not None and r["tag"] == "counting" for r in records])
    # Of three quarters of the scenes, 3 of 8; three standard deviations.
    assert counted == pytest.approx(9 / 32, abs=3 * math.sqrt(0.2 / 60))
    texts = {
        split: [
            str((row["captions"], row["conversations"]))
            for row in rows(tmp_path / "more", split).values()
        ]
        for split in COUNTS
    }
    # Half of the scenes have them, of which a few happen to have none.
    wide = np.mean([any(c in text for c in scenes.MORE_COLORS) for text in texts["train"]])
    assert wide == pytest.approx(0.42, abs=3 * math.sqrt(0.25 / 60))
    named = {
        split: [c for c in scenes.MORE_COLORS if any(c in text for text in found)]
        for split, found in texts.items()
    }
    assert len(named.pop("train")) >= 6 and not any(named.values())
    for split in named:
        plain, more = (rows(tmp_path / which, split) for which in ("plain", "more"))
        for i in plain:
            np.testing.assert_array_equal(plain[i]["image"], more[i]["image"])
    with pytest.raises(ValueError, match="counting is a number"):
        builders.ShapesOptions(counting=0)
    with pytest.raises(ValueError, match="wide is in percent"):
        builders.ShapesOptions(wide=101)


def test_a_quarter_of_the_captions_are_short():
    """Those of the prompts' own wording, over scenes of all kinds; three standard deviations."""
    rng, made = np.random.default_rng(0), [shapes.example(0, "train", i) for i in range(1500)]
    short = [
        e.record is not None and shapes.caption_of(e.scene, e.record, rng) == e.record["prompt"]
        for e in made
    ]
    # A description in words that are the prompt's by chance adds a little.
    assert 0.25 - 0.034 < np.mean(short) < 0.25 + 0.034 + 0.04


@pytest.mark.parametrize("colored", [0, 0.5, 0.75, 1])
def test_longer_captions_name_colors_as_often_as_asked(colored):
    """Of scenes that belong to no category, whose captions are all longer ones."""
    made = [shapes.example(0, "train", i, colored) for i in range(1500)]
    captions = [e.caption for e in made if e.record is None]
    named = np.mean([any(c in text for c in scenes.COLORS) for text in captions])
    assert abs(named - colored) < 3 * np.sqrt(colored * (1 - colored) / len(captions)) + 1e-9
    with pytest.raises(ValueError, match="percent"):
        builders.ShapesOptions(colored=101)


@pytest.mark.parametrize("relations", [0, 0.25, 1])
def test_questions_of_relation_are_put_as_often_as_asked(relations):
    """What is asked instead has the right answer: it is one of the scene's own questions."""
    put, possible, instead = 0, 0, 0
    for i in range(600):
        scene, rng = shapes.example(0, "train", i).scene, np.random.default_rng(i)
        full = shapes.conversation(scene, "train", 1, np.random.default_rng(i), 1)
        asked = shapes.conversation(scene, "train", 1, rng, relations)
        kinds = [q.kind for q in asked]
        if "relation" not in [q.kind for q in full]:
            assert full == asked
            continue
        possible, put = possible + 1, put + ("relation" in kinds)
        further = set(asked) - set(full)
        instead += len(further)
        known = {q for n in range(40) for q in shapes.ask(scene, "train", np.random.default_rng(n))}
        assert further <= {q for q in known if q.kind in ("color", "shape")}
    assert (
        abs(put / possible - relations) < 3 * np.sqrt(relations * (1 - relations) / possible) + 1e-9
    )
    assert instead >= 0.8 * (possible - put)
    with pytest.raises(ValueError, match="percent"):
        builders.ShapesOptions(relations=-1)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_conversation_does_not_tell_its_answers_by_their_order(rounds):
    """Of the existence questions half are answered with yes, at first and behind another one."""
    rng, first, later = np.random.default_rng(1), [], []
    for i in range(500):
        scene = shapes.example(0, "train", i).scene
        asked = shapes.conversation(scene, "train", rounds, rng)
        assert len({q.question for q in asked}) == len(asked)
        answers = [q.answer for q in asked if "existence" in q.kind]
        assert 1 <= len(answers) <= rounds
        first.append(answers[0] == "yes")
        later += [b != a for a, b in zip(answers, answers[1:], strict=False)]
    assert np.mean(first) == pytest.approx(0.5, abs=3 * 0.5 / 500**0.5)
    if rounds == 1:
        assert not later
    else:  # Equal questions are left out, and so equal answers a little more often.
        assert 0.5 - 3 * 0.5 / len(later) ** 0.5 < np.mean(later) < 0.6


def test_digits_are_the_scans_of_scikit_learn(digits_folder):
    data = load_digits()
    train, test = rows(digits_folder, "train"), rows(digits_folder, "test")
    assert (sorted(train), sorted(test)) == (list(range(1437)), list(range(1437, 1797)))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for i, row in (train | test).items():
        digit = data.target[i]
        assert json.loads(row["record"]) == {"digit": digit}
        # Two by two pixels are one of the scan's; bicubic enlarging keeps means but at edges.
        ink = row["image"].reshape(8, 2, 8, 2, 3).mean((1, 3, 4)) / 255 * 16
        assert np.corrcoef(ink.ravel(), data.images[i].ravel())[0, 1] > 0.97
        named = [words[digit] in t.decode() or str(digit) in t.decode() for t in row["captions"]]
        assert all(named)


def test_digit_questions_are_true_and_their_guesses_balanced(digits_folder):
    guessed = []
    source = open_source("tfds", str(digits_folder), "train", FIELDS)
    for i in range(len(source)):
        answers = dict(turns(source[i]))
        digit = answers.pop("Which digit is this?")
        even = digit in ("zero", "two", "four", "six", "eight")
        assert answers.pop("Is the digit even or odd?") == ("even" if even else "odd")
        ((question, answer),) = answers.items()
        assert answer == ("yes" if question == f"Is this the digit {digit}?" else "no")
        guessed.append(answer)
    yes = Counter(guessed)["yes"]
    assert yes / len(guessed) == pytest.approx(0.5, abs=3 * 0.5 / len(guessed) ** 0.5)


def test_building_again_does_nothing_and_never_overwrites(shapes_folder, tmp_path, capsys):
    def build(*options):
        return main(["build", "shapes", f"--out={shapes_folder}", *options])

    before = (shapes_folder / "dataset_info.json").stat().st_mtime_ns
    same = ["--size=40", "--seed=3", *(f"--{s}={n}" for s, n in COUNTS.items())]
    assert build(*same) == 0 and "as it was" in capsys.readouterr().out
    assert build(*same[1:]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert main(["build", "digits", f"--out={shapes_folder}"]) == 2
    assert (shapes_folder / "dataset_info.json").stat().st_mtime_ns == before
    (tmp_path / "mine").mkdir()
    assert main(["build", "digits", f"--out={tmp_path / 'mine'}"]) == 2


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "render", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        builders.build("shapes", builders.ShapesOptions(train=1), tmp_path / "shapes")
    assert not list(tmp_path.iterdir())
