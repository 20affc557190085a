"""`python -m jflow.data check` on small folders: what is wrong, what is right, what is drawn."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image, ImageFont

from jflow import checkpoints
from jflow.config import load
from jflow.data import contact
from jflow.data.__main__ import main
from jflow.data.check import check
from jflow.data.examples import Format, generation_example, text_example, understanding_example
from jflow.data.mixture import MixtureConfig, SourceConfig, WindowConfig
from jflow.data.pipeline import checkpoint_loader
from jflow.images import ImageProcessor
from tests.test_data_sources import png, write_lines
from tests.test_examples import PROCESSOR, TOKENIZER

CONFIG = """
from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig, WindowConfig
from jflow.training.config import TrainConfig
from jflow.training.optimizer import PRETRAINING


def get_config():
    return TrainConfig(
        name="checked", init_from="CKPT", steps=6, trainable=PRETRAINING, dtype="float32",
        data=DataConfig(
            sources=(
                SourceConfig("understanding", "jsonl", "FOLDER/pictures.jsonl"),
                SourceConfig("generation", "jsonl", "FOLDER/pictures.jsonl"),
                SourceConfig("text", "jsonl", "FOLDER/text.jsonl"),
            ),
            mixture=(MixtureConfig(0, 30, 50, 20), MixtureConfig(100, 14, 80, 6)),
            batch_rows=8, max_seq_len=160, threads=2, prefetch=2, drop_prompt=0,
            understanding=WindowConfig(3, 2), generation=WindowConfig(8, 2),
            text=WindowConfig(5, 1),
        ),
    )
"""
COLORS = [(200, 30, 30), (30, 160, 30), (30, 30, 200), (220, 220, 30)]
WORDS = ["red", "green", "dark blue", "a bright kind of yellow"]


def write(folder, ckpt, records) -> list[str]:
    """A config's data; returns the arguments for it."""
    for i, color in enumerate(COLORS):
        (folder / f"{i}.png").write_bytes(png(color, (40 + 8 * i, 32)))
    (folder / "broken.png").write_bytes(png((9, 9, 9), (64, 64))[:60])
    write_lines(folder / "pictures.jsonl", records)
    write_lines(
        folder / "text.jsonl", [{"text": f"A text of {'many ' * i}words."} for i in range(5)]
    )
    text = CONFIG.replace("FOLDER", str(folder)).replace("CKPT", str(ckpt))
    (folder / "config.py").write_text(text, encoding="utf-8")
    return [f"--config={folder / 'config.py'}", f"--out={folder / 'out'}", "--batches=1000"]


GOOD = [{"image": f"{i}.png", "caption": word} for i, word in enumerate(WORDS)]
BROKEN_IMAGE = {"image": "broken.png", "caption": "cut off"}
MISSING_CAPTION = {"image": "0.png"}
MISSING_IMAGE = {"image": "nowhere.png", "caption": "not there"}


@pytest.fixture(scope="module")
def good(tiny_ckpt, tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    arguments = write(folder, tiny_ckpt, GOOD)
    assert main(["check", *arguments]) == 0
    return folder, json.loads((folder / "out" / "check.json").read_text("utf-8"))


def test_broken_image_missing_caption_and_missing_image_are_listed(tiny_ckpt, tmp_path, capsys):
    records = [*GOOD, BROKEN_IMAGE, MISSING_CAPTION, MISSING_IMAGE]
    assert main(["check", *write(tmp_path, tiny_ckpt, records)]) == 1
    printed = capsys.readouterr()
    file = tmp_path / "pictures.jsonl"
    assert printed.out.count(f"{file} line 5: its image cannot be read") == 2
    assert printed.out.count(f"{file} line 6: it has no caption") == 2
    assert printed.out.count(f"{file} line 7: there is no image file") == 2
    for task in ("understanding", "generation"):
        assert f"3 of 7 records of {file} cannot be used for {task}" in printed.err
    sources = json.loads((tmp_path / "out" / "check.json").read_text("utf-8"))["sources"]
    assert [(s["records"], s["read"], len(s["broken"])) for s in sources] == [
        (7, 7, 3), (7, 7, 3), (5, 5, 0),
    ]  # fmt: skip


def test_lengths_are_those_of_the_examples(good, tiny_ckpt):
    folder, report = good
    _, files = checkpoints.read_metadata(tiny_ckpt)
    found = {source["task"]: source for source in report["sources"]}
    fmt = Format(TOKENIZER, ImageProcessor.from_files(files), 64, 16, 160, drop_prompt=0)
    records = [{"images": [png()], "caption": word} for word in WORDS]
    for task, make in (
        ("generation", generation_example),
        ("understanding", understanding_example),
    ):
        lengths = [len(make(record, fmt, 0).tokens) for record in records]
        tokens = found[task]["tokens"]
        assert (tokens["min"], tokens["max"]) == (min(lengths), max(lengths))
        assert tokens["mean"] == pytest.approx(np.mean(lengths))
        assert tokens["p50"] == pytest.approx(np.median(lengths))
        assert (found[task]["broken"], found[task]["images"]) == ([], 1)
    assert found["text"]["images"] == 0


def test_shares_of_the_mixture_are_exact(good):
    _, report = good
    first, later = report["mixture"]
    assert (first["from_step"], later["from_step"]) == (0, 100)
    assert (first["batches"], later["batches"]) == (100, 1000)
    assert first["rows"] == {"generation": 400, "understanding": 240, "text": 160}
    assert later["rows"] == {"generation": 6400, "understanding": 1120, "text": 480}


def test_packing_waste_is_that_of_the_loaders_rows(good, tiny_ckpt):
    """Rows of eight windows of each task, looked at in the batches that training gets."""
    folder, report = good
    data = load(folder / "config.py").data
    models, files = checkpoints.read_metadata(tiny_ckpt)
    loader = checkpoint_loader(data, models, files)
    wanted = {task: 8 * getattr(data, task).rows for task in loader.streams}
    used = dict.fromkeys(wanted, 0)
    seen = dict.fromkeys(wanted, 0)
    for step, (batch, _) in enumerate(loader.batches()):
        text, images = loader.local_rows(step)
        for part, rows in ((batch.text, text), (batch.images, images)):
            for number, row in enumerate(rows):
                if row is not None and row.number < wanted[row.task]:
                    # Hidden prompts have segment 0: count up to the last position of each sample.
                    slots = part.slots[number]
                    ends = np.where(slots < data.max_seq_len, slots + 1, 0).max(initial=0)
                    filled = np.flatnonzero(part.segment_ids[number]).max(initial=-1) + 1
                    used[row.task] += max(ends, filled)
                    seen[row.task] += 1
        if seen == wanted:
            break
    for one in report["packing"]:
        padding = 1 - used[one["task"]] / (wanted[one["task"]] * data.max_seq_len)
        assert one["padding"] == pytest.approx(padding, abs=1e-9)
        assert 0 <= one["left_out"] < 1 and one["windows"] == 8


def test_contact_sheet_shows_every_picture_and_the_learned_words(good):
    folder, _ = good
    sheet = np.asarray(Image.open(folder / "out" / "contact_sheet.png")).astype(int)
    # Two sources with four pictures each; understanding pads the long side, in grey.
    for color in COLORS:
        found = (np.abs(sheet - color).max(-1) <= 1).sum()
        assert found > 192 * 192 + 192 * 192 * 32 / 64 * 0.9
    assert (np.abs(sheet - 127).max(-1) <= 1).sum() > 1000
    assert (sheet == (192, 0, 0)).all(-1).any(), "nothing is marked as learned"


def test_learned_text_is_the_answer_and_its_end():
    fmt = Format(TOKENIZER, PROCESSOR, 64, 4, 400, drop_prompt=0.0)
    turns = [{"from": "human", "value": "What is <image>?"}, {"from": "gpt", "value": "A red fox."}]
    turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]
    record = {"images": [png()], "conversations": turns}
    runs = contact.text_runs(understanding_example(record, fmt, 0), TOKENIZER)
    learned = [text.strip() for kind, text in runs if kind == "learned"]
    assert learned == ["A red fox.", "[end]", "Yes.", "[end]"]
    assert f"[image: {TOKENIZER.num_image_tokens} tokens]" in [text for _, text in runs]
    text = contact.text_runs(text_example({"text": "All of it."}, fmt, 0), TOKENIZER)
    assert text == [("read", "[begin]"), ("learned", "All of it."), ("learned", "[end]")]
    drawn = {"images": [png()], "caption": "a fox"}
    runs = contact.text_runs(generation_example(drawn, fmt, 0), TOKENIZER)
    assert {kind for kind, _ in runs} == {"read"} and "a fox" in "".join(t for _, t in runs)
    assert runs[-1][1] == "[time] [picture: 4 tokens]"
    dropped = Format(TOKENIZER, PROCESSOR, 64, 4, 400, drop_prompt=1.0)
    runs = contact.text_runs(generation_example(drawn, dropped, 0), TOKENIZER)
    assert [kind for kind, _ in runs] == ["read", "hidden", "read"]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda folder: (folder / "text.jsonl").write_text(""), "text.jsonl is empty"),
        (lambda folder: (folder / "text.jsonl").unlink(), "no .jsonl file"),
        (lambda folder: (folder / "config.py").unlink(), "no config file"),
    ],
    ids=["empty_file", "missing_file", "missing_config"],
)
def test_what_keeps_training_from_starting_is_one_sentence(
    tiny_ckpt, tmp_path, capsys, spoil, message
):
    arguments = write(tmp_path, tiny_ckpt, GOOD)
    spoil(tmp_path)
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unknown_field_and_missing_checkpoint(tiny_ckpt, tmp_path, capsys):
    arguments = write(tmp_path, tiny_ckpt, GOOD)
    assert main(["check", *arguments, "data.batch_row=3"]) == 2
    assert "did you mean 'batch_rows'?" in capsys.readouterr().err
    assert main(["check", *arguments, f"init_from={tmp_path / 'none'}"]) == 2
    assert "no checkpoint folder" in capsys.readouterr().err


def test_samples_that_fit_nowhere(tiny_ckpt, tmp_path, capsys):
    """A row too short for pictures makes every record of those sources unusable, and says so."""
    assert main(["check", *write(tmp_path, tiny_ckpt, GOOD), "data.max_seq_len=16"]) == 1
    assert "4 of 4 records" in capsys.readouterr().err


def test_the_limit_that_most_rows_reach_is_named(tiny_ckpt, tmp_path):
    """Short texts, ten of which do not fill a row: more samples would find no place."""
    write(tmp_path, tiny_ckpt, GOOD)
    write_lines(tmp_path / "texts.jsonl", [{"text": "Yes."}] * 40)
    config = load(tmp_path / "config.py")
    source = SourceConfig("text", "jsonl", str(tmp_path / "texts.jsonl"))
    data = dataclasses.replace(
        config.data,
        sources=(source,),
        mixture=(MixtureConfig(0, understanding=0, generation=0, text=1),),
        text=WindowConfig(samples=20, rows=2),
    )
    for samples, said in ((20, "rows are padding"), (30, "of the text samples find no place")):
        window = dataclasses.replace(data, text=WindowConfig(samples=samples, rows=2))
        found = check(dataclasses.replace(config, data=window), tmp_path / "out", 40, 1, 1)
        (warning,) = found.warnings
        assert said in warning and "raise data.samples_per_row, which most rows reach" in warning
    wider = dataclasses.replace(data, samples_per_row=11)
    (warning,) = check(dataclasses.replace(config, data=wider), tmp_path / "out", 40, 1, 1).warnings
    assert "which most rows reach" not in warning


def test_text_without_spaces_stays_in_its_cell():
    """Chinese, and a link: broken anywhere, nothing lost."""
    for word in ("\u753b\u4e00\u53ea\u732b" * 30, "https://example.com/" + "a" * 200):
        lines = contact._wrap([("read", word)], ImageFont.load_default(12))
        assert "".join(piece for line in lines for _, piece in line) == word + " "
        widths = [sum(ImageFont.load_default(12).getlength(p) for _, p in line) for line in lines]
        assert max(widths) <= contact.CELL + 4  # The space behind the last piece hangs over.
