"""The shapes world against closed forms, and what design says of its scenes and questions."""

import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from jflow.data import scenes, shapes

EXAMPLES = [shapes.example(0, "train", i) for i in range(300)]


@pytest.mark.parametrize("size", [32, 64, 257])
@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_every_shape_covers_the_area_of_its_circle(shape, size):
    radius, middle = 4.0 * size / 32, (size / 2 + 0.3, size / 2 - 0.2)
    alpha = scenes.coverage(shape, *middle, radius, scenes.pixel_grid(size))
    # Anti-aliasing rounds corners off by less than a pixel's area each.
    assert alpha.sum() == pytest.approx(math.pi * radius**2, rel=0.02 * 32 / size + 0.005)
    x, y = (
        np.sum(alpha * axis) / alpha.sum() for axis in np.moveaxis(scenes.pixel_grid(size), -1, 0)
    )
    assert math.hypot(x - middle[0], y - middle[1]) < 0.05


def test_pictures_are_grey_with_as_many_separate_shapes_as_objects():
    """Counted by scipy on the picture alone."""
    for example in EXAMPLES[:100]:
        image = scenes.render(example.scene)
        assert image.shape == (32, 32, 3) and image.dtype == np.float32
        assert np.abs(image).max() <= 1
        assert np.median(image) == pytest.approx(2 * scenes.BACKGROUND - 1)
        foreground = np.abs(image - np.float32(2 * scenes.BACKGROUND - 1)).max(-1) > 0.25
        _, count = ndimage.label(foreground)
        assert count == len(example.scene.objects) and 1 <= count <= 4


def test_radius_and_gap():
    for example in EXAMPLES:
        objects = example.scene.objects
        assert all(3.4 <= o.radius <= 4.6 for o in objects)
        for i, a in enumerate(objects):
            assert all(scenes.gap(a, b) >= 1.5 for b in objects[:i])


WIDE = [shapes.example(0, "train", i, of=scenes.WIDE) for i in range(300)]


@pytest.mark.parametrize("examples", [EXAMPLES, WIDE], ids=["train", "wide"])
def test_held_out_pairs_never_occur_in_training(examples):
    """Not in pictures, captions, questions or prompts; each colour is held out once."""
    held = {(s, c) for s, colors in scenes.HELD_OUT.items() for c in colors}
    assert len(held) == 8 and Counter(c for _, c in held) == Counter(list(scenes.COLORS))
    for example in examples:
        assert not held & {(o.shape, o.color) for o in example.scene.objects}
        texts = [example.caption, *(q.question for q in example.questions)]
        for shape, color in held:
            assert not any(re.search(rf"\b{color} {shape}", text) for text in texts)
    for i in range(120):
        include = shapes.prompt(0, "unseen", i)["include"]
        colored = {(want["class"], want["color"]) for want in include if "color" in want}
        assert colored <= held


def test_more_colors_come_in_all_shapes_and_never_near_a_pair_that_is_held_out():
    """As often as any other pair; three standard deviations."""
    shown = [(o.shape, o.color) for example in WIDE for o in example.scene.objects]
    more = [pair for pair in shown if pair[1] in scenes.MORE_COLORS]
    assert set(more) == {(s, c) for s in scenes.SHAPES for c in scenes.MORE_COLORS}
    # What stands together is not drawn apart: "two red circles" count twice.
    error = math.sqrt(2 * 0.245 / len(shown))
    assert len(more) / len(shown) == pytest.approx(32 / 56, abs=3 * error)
    for example in WIDE:
        named = {o.color for o in example.scene.objects if o.color in scenes.MORE_COLORS}
        assert all(color in example.caption for color in named), example.caption
    for color, rgb in scenes.MORE_COLORS.items():
        for named in scenes.COLORS.values():
            assert math.dist(rgb, named) > 0.25, color


def test_prompts_are_worded_as_in_geneval():
    wording = {
        "single_object": r"a photo of a (\w+)",
        "two_object": r"a photo of a (\w+) and a (\w+)",
        "counting": r"a photo of (two|three|four) (\w+)s",
        "colors": r"a photo of an? (\w+) (\w+)",
        "position": r"a photo of a (\w+) (left of|right of|above|below) a (\w+)",
        "color_attr": r"a photo of an? (\w+) (\w+) and an? (\w+) (\w+)",
    }
    for i in range(120):
        record = shapes.prompt(3, "seen", i)
        assert re.fullmatch(wording[record["tag"]], record["prompt"]), record
    tags = Counter(shapes.prompt(3, "seen", i)["tag"] for i in range(120))
    assert tags == Counter(dict.fromkeys(wording, 20))


def test_scenes_hold_what_their_records_ask_for():
    for example in EXAMPLES:
        if example.record is None:
            continue
        for want in example.record["include"]:
            found = [
                o for o in example.scene.objects
                if o.shape == want["class"] and want.get("color", o.color) == o.color
            ]  # fmt: skip
            assert len(found) == want["count"]


def test_answers_to_existence_questions_are_balanced_and_true():
    asked = [(e.scene, q) for e in EXAMPLES for q in e.questions if "existence" in q.kind]
    share = np.mean([q.answer == "yes" for _, q in asked])
    assert share == pytest.approx(0.5, abs=0.02)
    for scene, question in asked:
        (shape,) = [s for s in scenes.SHAPES if re.search(rf"\b{s}\b", question.question)]
        colors = [c for c in scenes.COLORS if re.search(rf"\b{c}\b", question.question)]
        there = any(o.shape == shape and (not colors or o.color in colors) for o in scene.objects)
        assert question.answer == ("yes" if there else "no"), question


def test_everything_follows_from_seed_split_and_index():
    assert shapes.example(0, "train", 7) == EXAMPLES[7]
    assert shapes.example(1, "train", 7) != EXAMPLES[7]
    assert shapes.example(0, "seen", 7) != EXAMPLES[7]
    with pytest.raises(ValueError, match="splits of shapes are train, seen, unseen"):
        shapes.example(0, "test", 7)


def test_relative_position_is_genevals_rule():
    """Boxes as in its evaluate_images.py: shortened by a tenth of the sizes, then half."""
    unit = (0, 0, 2, 2)
    assert scenes.relative_position(unit, (10, 0, 12, 2)) == {"left of"}
    assert scenes.relative_position(unit, (0, 10, 2, 12)) == {"above"}
    assert scenes.relative_position((10, 10, 12, 12), unit) == {"right of", "below"}
    assert scenes.relative_position(unit, (0.2, 0.2, 2.2, 2.2)) == set()
