"""The shapes benchmark, taken by a stand-in that knows every answer, and by one that knows none."""

import json

import numpy as np
import pytest

from jflow.data import shapes
from jflow.data.scenes import render
from jflow.evals import __main__ as cli
from jflow.evals.benchmark import BenchmarkConfig, answer_scores, ask, draw
from jflow.evals.geneval import score, shuffled
from jflow.evals.pages import answer_page, drawing_page
from jflow.images import ImageProcessor, to_uint8

CONFIG = BenchmarkConfig(prompts=24, pictures=6, batch_size=7)


class Oracle:
    """Draws what the records of a split say, and looks answers up by picture and question."""

    processor = ImageProcessor(image_size=40)  # It is asked about pictures of its own size.

    def __init__(self):
        self.scenes, self.answers = {}, {}
        for split in ("seen", "unseen"):
            for i in range(CONFIG.prompts):
                record = shapes.prompt(CONFIG.seed, split, i)
                rng = np.random.default_rng(i)
                self.scenes[split, i] = shapes.scene_for(record, split, rng)
            for i in range(CONFIG.pictures):
                example = shapes.example(CONFIG.seed, split, i)
                picture = to_uint8(render(example.scene, 40)).tobytes()
                for q in example.questions:
                    self.answers[picture, q.question] = q.answer
        self.split = "seen"

    def generate(self, texts, num, options, batch_size, first_ids):
        assert num == 1 and options.seed == CONFIG.seed
        for first in range(0, len(texts), batch_size):
            ids = list(first_ids)[first : first + batch_size]
            yield np.stack([to_uint8(render(self.scenes[self.split, i])) for i in ids])

    def answer(self, questions, options):
        assert len(questions) == CONFIG.batch_size
        found = []
        for question in questions:
            text = question.messages[0].content.split("\n")[-1]
            picture = np.asarray(question.images[0]).tobytes()
            found.append(self.answers.get((picture, text), "?"))
        yield ["" for _ in questions]
        yield found


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_who_knows_all_has_full_marks(split):
    oracle = Oracle()
    oracle.split = split
    drawn = draw(oracle, split, CONFIG)
    result = score(drawn.pictures, drawn.records)
    assert result["plain"]["overall"] == result["strict"]["overall"] == 1
    answers = answer_scores(ask(oracle, split, CONFIG))
    assert set(answers.values()) == {1.0} and {"all", "color", "shape", "count"} <= set(answers)


def test_other_prompts_and_other_pictures_are_the_level_of_chance():
    oracle = Oracle()
    drawn = draw(oracle, "seen", CONFIG)
    assert score(drawn.pictures, shuffled(drawn.records, 0))["plain"]["overall"] < 0.5
    assert answer_scores(ask(oracle, "seen", CONFIG, shift=1))["all"] < 0.5


def test_pages_mark_what_is_wrong():
    oracle = Oracle()
    drawn, answered = draw(oracle, "seen", CONFIG), ask(oracle, "seen", CONFIG)

    def red(page):
        return int(np.sum((page[..., 0] > 150) & (page[..., 1] < 60) & (page[..., 2] < 60)))

    blank = type(drawn)(drawn.records, np.full_like(drawn.pictures, 0.1))
    assert red(drawing_page(blank)) > red(np.zeros((1, 1, 3)))
    wrong = type(answered)(answered.questions, answered.pictures, ["?"] * len(answered.answers))
    assert red(answer_page(wrong)) > red(answer_page(answered)) + 200


def test_command_writes_scores_and_pages(tmp_path, monkeypatch, capsys):
    oracle = Oracle()
    asked = []
    monkeypatch.setattr(cli.Pipeline, "from_checkpoint", lambda path: asked.append(path) or oracle)
    arguments = ["--ckpt", "x", "--out", str(tmp_path / "e"), "--untrained", "y"]
    assert cli.main(arguments) == 2 and not asked  # before anything is scored
    assert "There is no checkpoint folder y." in capsys.readouterr().err
    monkeypatch.setattr(cli, "find_checkpoint", lambda path: path)
    assert cli.main([*arguments, "prompts=24", "pictures=6", "batch_size=7"]) == 0
    found = json.loads((tmp_path / "e" / "scores.json").read_text())
    assert found["generation"]["colors"] == 1 and found["answers"]["all"] == 1
    assert {
        "generation_unseen",
        "chance",
        "chance_unseen",
        "answers_unseen",
        "untrained",
        "seconds",
    } <= set(found)
    assert (tmp_path / "e" / "drawn.png").exists() and (tmp_path / "e" / "answered.png").exists()
    assert "| generation | 100 |" in capsys.readouterr().out
    assert cli.main(["--ckpt", "x", "--out", str(tmp_path), "prompts=3"]) == 2
