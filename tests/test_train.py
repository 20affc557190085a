"""train.py as a user runs it: interrupted, continued, refused; and what its checkpoints are for."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sample
import train
from jflow import checkpoints
from jflow.convert.__main__ import main as convert
from tests.goldens import REPO

CONFIG = """
from jflow.data.mixture import DataConfig, MixtureConfig, SourceConfig, WindowConfig
from jflow.training.config import TrainConfig
from jflow.training.objectives import ObjectiveConfig
from jflow.training.optimizer import PRETRAINING, OptimizerConfig
from jflow.training.state import EMAConfig


def source(task, file):
    return SourceConfig(task=task, kind="jsonl", path="FOLDER/" + file)


def get_config():
    return TrainConfig(
        name="test", init_from="CKPT", steps=6, trainable=PRETRAINING, dtype="float32",
        remat="none",
        data=DataConfig(
            sources=(
                source("understanding", "captions.jsonl"),
                source("generation", "captions.jsonl"),
                source("text", "text.jsonl"),
            ),
            mixture=(MixtureConfig(0, understanding=1, generation=2, text=1),),
            batch_rows=4, max_seq_len=128,
            understanding=WindowConfig(2, 1), generation=WindowConfig(2, 1),
            text=WindowConfig(2, 1),
        ),
        objective=ObjectiveConfig(repa_layer=2), repa_hidden_size=16,
        optimizer=OptimizerConfig(warmup_steps=2, learning_rate=1e-3), ema=EMAConfig(0.9, 2),
        log_every=1, save_every=2, keep=3,
    )
"""


@pytest.fixture(scope="module")
def command(tiny_ckpt, tmp_path_factory):
    """The arguments of a run but for its folder; programs are compiled once for all tests."""
    folder = tmp_path_factory.mktemp("train")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "cache")
    captions = [
        {"image": str(REPO / "docs" / name), "caption": text}
        for name, text in (("cat.jpg", "a cat"), ("coffee.jpg", "a cup of coffee"))
    ]
    texts = [{"text": f"Line {i} of a text."} for i in range(9)]
    for name, records in (("captions.jsonl", captions * 6), ("text.jsonl", texts)):
        (folder / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    config = CONFIG.replace("FOLDER", str(folder)).replace("CKPT", str(tiny_ckpt))
    (folder / "config.py").write_text(config, encoding="utf-8")
    return ["--config", str(folder / "config.py")]


def start(command, run, *more):
    return subprocess.Popen(
        [sys.executable, "-u", "train.py", *command, "--run", str(run), *more],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(command, run, *more) -> str:
    process = start(command, run, *more)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


def contents(run, step):
    """Every array of a checkpoint: averaged and frozen parameters, and the state by names."""
    folder = run / f"{step:08d}"
    params, _, _ = checkpoints.load_checkpoint(folder)
    with checkpoints._checkpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.state.tree
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in tree.items()}
    state = checkpoints.load_state(folder, like)
    return jax.tree.map(np.asarray, (params, state))


def log(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = re.compile("mfu|share_waiting_for_.*|.*_per_second|seconds_per_step")
    return [{k: v for k, v in line.items() if not measured.fullmatch(k)} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(command, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    finish(command, run)
    return run


def equal(run, other, step=6):
    assert log(run) == log(other)
    jax.tree.map(np.testing.assert_array_equal, contents(run, step), contents(other, step))


def test_a_run_learns_and_keeps_what_it_should(uninterrupted):
    """Losses fall, the log is whole, the last three checkpoints are there."""
    lines = log(uninterrupted)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["ar"] < lines[0]["ar"] and lines[-1]["skipped"] == 0
    assert {"rf", "repa_cosine", "gradient_norm", "learning_rate", "padding"} <= set(lines[0])
    names = {file.name for file in uninterrupted.iterdir()}
    files = {"metrics.jsonl", "tensorboard", "train.json"}
    assert names == {"00000002", "00000004", "00000006"} | files


def test_frozen_parameters_are_those_of_the_start(uninterrupted, tiny_ckpt):
    """Stage 2 trains all but SigLIP and the VAE."""
    before, _, _ = checkpoints.load_checkpoint(tiny_ckpt)
    after, _, _ = checkpoints.load_checkpoint(uninterrupted)
    for part in ("vae",):
        jax.tree.map(np.testing.assert_array_equal, before[part], after[part])
    siglip = "vision_und_enc_model"
    jax.tree.map(
        np.testing.assert_array_equal, before["janusflow"][siglip], after["janusflow"][siglip]
    )
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before["janusflow"], after["janusflow"])
    del moved[siglip]
    assert all(jax.tree.leaves(moved))


def test_a_continued_run_equals_an_uninterrupted_one(command, uninterrupted, tmp_path):
    """Bit for bit: parameters, averages, moments, guard, every line of the log."""
    finish(command, tmp_path / "run", "steps=3")
    output = finish(command, tmp_path / "run")
    assert "step 3 of 6" in output
    equal(tmp_path / "run", uninterrupted)


def test_sigterm_saves_and_says_that_it_is_not_done(command, uninterrupted, tmp_path):
    process = start(command, tmp_path / "run", "save_every=100")
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not log(tmp_path / "run"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == train.STOPPED and "is saved in" in output
    stopped = log(tmp_path / "run")[-1]["step"]
    sentence = f"train.py: stopped at step {stopped} of 6: the same command continues."
    assert output.splitlines()[-1] == sentence
    finish(command, tmp_path / "run")
    equal(tmp_path / "run", uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(command, uninterrupted, tmp_path):
    run = tmp_path / "run"
    finish(command, run, "steps=4")
    victim = max((run / "00000004" / "state").rglob("*"), key=lambda f: f.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    process = start(command, run)
    output, _ = process.communicate()
    assert "00000004 is damaged" in output and "step 2 of 6" in output
    assert process.returncode == 0, output
    equal(run, uninterrupted)


@pytest.mark.slow
def test_five_kills_at_random_moments_lose_nothing(command, uninterrupted, tmp_path):
    """SIGKILL, three times in the middle of a save: the restart equals an uninterrupted run."""
    rng, run, in_a_save = np.random.default_rng(0), tmp_path / "run", 0

    def saving() -> bool:
        return any(not checkpoints.is_checkpoint(folder) for folder in run.glob("[0-9]*"))

    for kill in range(5):
        process = start(command, run, "save_every=1")
        lines = iter(process.stdout.readline, "")
        assert any("test: step" in line for line in lines)  # What was left of a save is removed.
        while not (kill % 2 or saving()):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(float(rng.uniform(6, 14) if kill % 2 else rng.uniform(0, 0.05)))
        process.kill()
        process.communicate()
        in_a_save += saving()
    assert in_a_save >= 2
    finish(command, run, "save_every=1")
    equal(run, uninterrupted)


def test_its_checkpoints_draw_answer_and_convert(uninterrupted, tmp_path):
    run = str(uninterrupted)
    out = str(tmp_path / "out")
    assert sample.main(["--ckpt", run, "--prompt", "a cat", "--steps", "2", "--out", out]) == 0
    assert sample.main(["--ckpt", run, "--question", "What?", "--max-new-tokens", "8"]) == 0
    assert convert(["to-hf", run, "--out", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def cheap_objective(params, batch, whole, step, *, seed, modules, config):
    """In place of the model's, for tests of what is around it: compiles in no time."""
    leaves = jax.tree.leaves(params["janusflow"])
    loss = sum(jnp.mean(jnp.square(leaf - 1.0)) for leaf in leaves)
    return loss, {"rf": (loss, jnp.ones(()))}


def test_what_a_person_sees_on_the_way(command, tmp_path, monkeypatch, capsys):
    """Samples before the first step and every third one, a trace of two, speeds, the bar."""
    monkeypatch.setattr(train, "janusflow", cheap_objective)
    run, cat = tmp_path / "run", str(REPO / "docs" / "cat.jpg")
    more = [
        "samples.prompts=('a cat',)", f"samples.questions=(({cat!r}, 'What?'),)",
        "samples.every=3", "samples.steps=1", "samples.max_new_tokens=1", "save_every=100",
    ]  # fmt: skip
    assert train.main([*command, *more, "--run", str(run), "--profile", "2"]) == 0
    samples = [f"{step:08d}.{kind}" for step in (0, 3, 6) for kind in ("png", "txt")]
    assert sorted(file.name for file in (run / "samples").iterdir()) == samples
    assert len(list((run / "profile").rglob("*.xplane.pb"))) == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["mfu"] > 0 and line["tokens_per_second"] > 0 and line["images_per_second"] > 0
        assert 0 <= line["share_waiting_for_data"] <= 1
    # The samples of step 3 count in the line of step 4.
    assert ["share_waiting_for_samples" in line for line in lines] == [
        True, False, False, True, False, False,
    ]  # fmt: skip
    shown = EventAccumulator(str(run / "tensorboard"))
    shown.Reload()
    assert [image.step for image in shown.Images("samples/images")] == [0, 3, 6]
    assert "6/6" in capsys.readouterr().err
    # sample.py draws both halves of the last picture: raw parameters above their average.
    with Image.open(run / "samples" / "00000006.png") as picture:
        raw, averaged = np.asarray(picture)[:64], np.asarray(picture)[-64:]
    assert not np.array_equal(raw, averaged)
    draw = ["--ckpt", str(run), "--prompt", "a cat", "--num", "1", "--steps", "1"]
    for more, want in (["--raw"], raw), ([], averaged):
        out = tmp_path / "".join(["out", *more])
        assert sample.main([*draw, *more, "--out", str(out)]) == 0
        with Image.open(out / "0000_000.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), want)


def test_a_task_may_join_between_two_lines_of_the_log(command, tmp_path, monkeypatch):
    def objective(params, batch, whole, step, **named):
        loss, sums = cheap_objective(params, batch, whole, step, **named)
        return loss, sums if batch.text is None else sums | {"ar": (loss, jnp.ones(()))}

    monkeypatch.setattr(train, "janusflow", objective)
    text = Path(command[1]).read_text(encoding="utf-8")
    alone = "MixtureConfig(0, understanding=0, generation=1, text=0)"
    changed = text.replace("MixtureConfig(0, ", f"{alone}, MixtureConfig(3, ")
    assert changed.count("MixtureConfig(") == 2
    (tmp_path / "config.py").write_text(changed, encoding="utf-8")
    more = ["--config", str(tmp_path / "config.py"), "--run", str(tmp_path / "run")]
    assert train.main([*more, "steps=6", "log_every=2", "save_every=100"]) == 0
    assert [("ar" in line, line["skipped"]) for line in log(tmp_path / "run")] == [
        (False, 0), (True, 0), (True, 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "more, message",
    [
        (["optimizer.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["steps=0"], "steps must be at least 1"),
        (["dtype=float16"], "dtype must be float32 or bfloat16"),
        (["trainable=('janusflow/nothing',)"], "No parameter matches 'janusflow/nothing'"),
        (["init_from=nowhere"], "no checkpoint folder nowhere"),
        (["data.sources.0.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["objective.repa_layer=9"], "outside the model's blocks 1..4"),
    ],
)
def test_bad_configs_are_one_sentence(command, tmp_path, more, message, capsys):
    assert train.main([*command, "--run", str(tmp_path / "run"), *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train.py: ") and message in error


def test_a_run_of_another_config_is_not_continued(command, uninterrupted, capsys):
    assert train.main([*command, "--run", str(uninterrupted), "seed=1", "data.seed=3"]) == 2
    assert "trained with another data.seed, seed" in capsys.readouterr().err
