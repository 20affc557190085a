"""Every bad input that train.py is given by name: one sentence that says what to do, no traceback.

What a single bad record or file leads to is tested where it is read: test_data_sources.py and
test_examples.py; overrides in test_config.py.
"""

import json
import os
import resource
import shutil

import numpy as np
import pytest

import train
from jflow import checkpoints
from jflow.training import runs
from tests.goldens import REPO
from tests.test_train import CONFIG, cheap_objective


@pytest.fixture
def command(tiny_ckpt, tmp_path):
    """The arguments of a run that learns texts and captions, its files, and how to change them."""
    (tmp_path / "text.jsonl").write_text('{"text": "A line."}\n' * 4, encoding="utf-8")
    caption = {"image": str(REPO / "docs" / "cat.jpg"), "caption": "a cat"}
    (tmp_path / "captions.jsonl").write_text((json.dumps(caption) + "\n") * 4, encoding="utf-8")
    config = CONFIG.replace("FOLDER", str(tmp_path)).replace("CKPT", str(tiny_ckpt))
    (tmp_path / "config.py").write_text(config, encoding="utf-8")
    return ["--config", str(tmp_path / "config.py"), "--run", str(tmp_path / "run")]


@pytest.fixture
def refused(command, capsys, monkeypatch):
    """Runs train.py with more arguments and returns what it says; no step may be computed."""

    def no_step(*_, **__):
        raise AssertionError("A step was computed.")

    monkeypatch.setattr(train, "train_step", no_step)

    def run(*more):
        assert train.main([*command, *more]) == 2
        said = capsys.readouterr().err.strip()
        assert "Traceback" not in said
        return said[said.index("train.py: ") :]

    return run


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"image": "text.jsonl", "caption": "a cat"}, "its image cannot be read"),
        ({"image": "nothing.jpg", "caption": "a cat"}, "nothing.jpg"),
        ({"image": "CAT"}, "caption"),
        ({"image": "CAT", "caption": " "}, "caption"),
    ],
    ids=["broken image", "missing image", "missing caption", "empty caption"],
)
def test_broken_records_beyond_the_share_stop_the_run_with_their_list(
    refused, tmp_path, record, reason
):
    cat = {"CAT": str(REPO / "docs" / "cat.jpg")}
    record = {name: cat.get(value, value) for name, value in record.items()}
    (tmp_path / "captions.jsonl").write_text((json.dumps(record) + "\n") * 3, encoding="utf-8")
    said = refused("data.max_broken_share=0.0")
    assert "samples come from broken records" in said and "repair them, or raise it" in said
    assert "captions.jsonl" in said.splitlines()[1] and reason in said.splitlines()[1]


def test_empty_file(refused, tmp_path):
    (tmp_path / "captions.jsonl").write_text("")
    said = refused()
    assert "captions.jsonl" in said and "empty" in said


def test_unknown_field(refused):
    assert "did you mean 'learning_rate'?" in refused("optimizer.learning_rat=1")
    assert "did you mean 'every'?" in refused("samples.evry=1")


def test_out_of_memory(refused, monkeypatch):
    def run(*given):
        raise MemoryError

    monkeypatch.setattr(train, "run", run)
    assert "out of memory; raise optimizer.accumulate" in refused()


def test_read_only_folder(refused, tmp_path):
    """As root, whom no mode keeps out, a folder in which the kernel lets nobody write."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        folder = "/proc"
    said = refused("--run", f"{folder}/run")
    assert f"The run folder {folder}/run cannot be written" in said and "--run" in said


def test_wrong_tokenizer(refused, tiny_ckpt, tmp_path):
    """One with more words than the model has embeddings."""
    params, models, files = checkpoints.load_checkpoint(tiny_ckpt)
    tokenizer = json.loads(files["tokenizer.json"])
    words = tokenizer["model"]["vocab"]
    words |= {f"word{i}": 600 + i for i in range(100)}
    files["tokenizer.json"] = json.dumps(tokenizer)
    checkpoints.save_checkpoint(tmp_path / "wrong", params, models, files)
    said = refused(f"init_from={tmp_path / 'wrong'}")
    assert "the tokenizer's vocabulary (" in said and "the model's embeddings (512)" in said


def test_no_tokenizer(refused, tiny_ckpt, tmp_path):
    params, models, _ = checkpoints.load_checkpoint(tiny_ckpt)
    checkpoints.save_checkpoint(tmp_path / "without", params, models, {})
    assert "holds no tokenizer.json" in refused(f"init_from={tmp_path / 'without'}")


def test_tags_without_embeddings(refused, tiny_ckpt, tmp_path):
    """The step would have NaN for them."""
    params, models, files = checkpoints.load_checkpoint(tiny_ckpt)
    tags = {"image_end_tag": "<over>", "image_start_tag": "<from>"}
    files["processor_config.json"] = json.dumps(json.loads(files["processor_config.json"]) | tags)
    checkpoints.save_checkpoint(tmp_path / "tagged", params, models, files)
    said = refused(f"init_from={tmp_path / 'tagged'}")
    assert "have token ids up to 514, but the model" in said and "only 512 embeddings" in said


def test_repa_with_another_mean(refused, tiny_ckpt, tmp_path):
    params, models, files = checkpoints.load_checkpoint(tiny_ckpt)
    files["preprocessor_config.json"] = '{"image_size": 64}'
    checkpoints.save_checkpoint(tmp_path / "clip", params, models, files)
    said = refused(f"init_from={tmp_path / 'clip'}")
    assert "expects another mean or deviation" in said and "objective.repa_weight=0" in said


def test_a_checkpoint_that_is_none(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "There is no checkpoint folder nowhere" in refused("init_from=nowhere")
    assert "not a complete jflow checkpoint" in refused(f"init_from={tmp_path / 'empty'}")


def test_a_damaged_checkpoint_to_begin_from(refused, tiny_ckpt, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(tiny_ckpt, copy)
    largest = max((copy / "params").rglob("*"), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-5])
    assert f"{largest.name} is not what was written" in refused(f"init_from={copy}")


def test_what_cannot_be_sampled(refused):
    prompt = "samples.prompts=('a cat',)"
    said = refused("samples.questions=(('nowhere.png', 'What?'),)", "samples.every=5")
    assert "There is no image file nowhere.png" in said
    assert "give samples.prompts or .questions" in refused("samples.every=5")
    assert "samples.every must be at least 0" in refused(prompt, "samples.every=-1")


@pytest.fixture
def cheap(monkeypatch):
    monkeypatch.setattr(train, "janusflow", cheap_objective)


def test_no_space_left(command, cheap, tmp_path, capsys):
    """A disk that is full when a checkpoint is due: one sentence, and the one before is whole."""
    run = tmp_path / "run"
    assert train.main([*command, "steps=1"]) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert train.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capsys.readouterr().err
    said = said[said.index("train.py: ") :]
    assert "00000002 cannot be written" in said and "make room" in said
    assert len(said.splitlines()) == 1
    assert runs.steps(run) == [1]
    checkpoints.load_checkpoint(run)
    assert train.main([*command, "steps=3"]) == 0
    assert max(runs.steps(run)) == 3


def test_a_checkpoint_of_another_config(command, cheap, capsys):
    assert train.main([*command, "steps=1"]) == 0
    assert train.main([*command, "seed=1", "data.seed=3"]) == 2
    said = capsys.readouterr().err
    assert "was trained with another data.seed, seed: use another --run folder" in said


@pytest.mark.parametrize(
    "fields, message",
    [
        ("data.drop_prompt=10", "drop_prompt is a share from 0 to 1, not 10"),
        ("data.max_broken_share=5", "max_broken_share is a share from 0 to 1"),
        ("data.seed=-1", "data.seed must be from 0 to 4294967295, not -1"),
        ("seed=4294967296", "seed must be from 0 to 4294967295"),
        ("optimizer.clip_norm=0", "clip_norm must be above 0, not 0"),
        ("samples.every=2 samples.prompts=('a',) samples.steps=0", "steps must be at least 1"),
    ],
)
def test_numbers_that_would_ruin_a_run(refused, fields, message):
    assert message in refused(*fields.split())


def test_a_repa_head_of_another_width(refused, command, tiny_ckpt, tmp_path):
    params, config, files = checkpoints.load_checkpoint(tiny_ckpt)
    head = {"linear_1": {"kernel": np.zeros((64, 24), np.float32)}}
    checkpoints.save_checkpoint(tmp_path / "with", params | {"repa": head}, config, files)
    said = refused(f"init_from={tmp_path / 'with'}")
    assert "The REPA head in" in said and "has hidden size 24" in said


def test_without_repa_a_head_of_any_width_goes(command, cheap, tiny_ckpt, tmp_path):
    params, config, files = checkpoints.load_checkpoint(tiny_ckpt)
    head = {"linear_1": {"kernel": np.zeros((64, 24), np.float32)}}
    checkpoints.save_checkpoint(tmp_path / "with", params | {"repa": head}, config, files)
    more = [f"init_from={tmp_path / 'with'}", "objective.repa_weight=0", "steps=1"]
    assert train.main([*command, *more]) == 0
    assert "repa" not in checkpoints.load_shapes(tmp_path / "run")
