"""sample.py as a user runs it: files, metadata, messages, exit codes, compiled programs."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import sample
from jflow.convert.__main__ import main as convert
from jflow.inference.pipeline import Pipeline
from tests.goldens import GOLDEN, REPO


def test_images_and_grid_with_their_settings(tiny_ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--ckpt", str(tiny_ckpt), "--out", str(out), "--steps", "2", "--num", "3"]
    args += ["--prompt", "a cat", "--prompt", "two cats", "--seed", "9", "--solver", "heun"]
    assert sample.main(args) == 0
    names = sorted(file.name for file in out.iterdir())
    assert names == [f"000{p}_00{i}.png" for p in (0, 1) for i in range(3)] + ["grid.png"]
    with Image.open(out / "0001_002.png") as image:
        assert image.size == (64, 64)
        info = image.info
    assert info["prompt"] == "two cats" and info["index"] == "2" and info["solver"] == "heun"
    assert info["steps"] == "2" and info["seed"] == "9"
    assert info["dtype"] == "float32" and info["raw"] == "False"
    assert info["ckpt"] == str(tiny_ckpt.resolve())
    grid = np.asarray(Image.open(out / "grid.png"))
    single = np.asarray(Image.open(out / "0001_002.png"))
    np.testing.assert_array_equal(grid[-64:, -64:], single)
    printed = capsys.readouterr()
    assert "6 images and grid.png" in printed.out
    assert re.search(r"compiling [\d.]+ s .* running [\d.]+ s", printed.err)


def test_prompts_from_a_file_equal_prompts_from_the_command_line(tiny_ckpt, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two cats \n", encoding="utf-8")
    common = ["--ckpt", str(tiny_ckpt), "--steps", "2", "--num", "1"]
    file = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "a")]
    line = ["--prompt", "a cat", "--prompt", "two cats", "--out", str(tmp_path / "b")]
    assert sample.main(common + file) == 0 and sample.main(common + line) == 0
    a, b = (np.asarray(Image.open(tmp_path / x / "grid.png")) for x in "ab")
    np.testing.assert_array_equal(a, b)


def test_image_to_image(tiny_ckpt, tmp_path):
    args = ["--ckpt", str(tiny_ckpt), "--out", str(tmp_path), "--prompt", "a cat", "--num", "1"]
    args += ["--init-image", str(REPO / "docs" / "cat.jpg"), "--strength", "0.5", "--steps", "4"]
    assert sample.main(args) == 0
    with Image.open(tmp_path / "0000_000.png") as image:
        assert image.info["init_image"].endswith("cat.jpg") and image.info["strength"] == "0.5"


def test_a_conversation_of_two_turns_about_two_images(tiny_ckpt, capsys):
    args = ["--ckpt", str(tiny_ckpt), "--max-new-tokens", "9"]
    args += [
        "--image",
        str(REPO / "docs" / "cat.jpg"),
        "--image",
        str(REPO / "docs" / "coffee.jpg"),
    ]
    assert sample.main([*args, "--question", "What is this?"]) == 0
    one = capsys.readouterr().out
    assert sample.main([*args, "--question", "What is this?", "--question", "Sure?"]) == 0
    two = capsys.readouterr().out
    assert two.startswith(f"> What is this?\n{one}> Sure?\n") and len(two) > len(one) + 30


def test_a_file_of_questions(tiny_ckpt, tmp_path, capsys):
    Image.open(REPO / "docs" / "cat.jpg").save(tmp_path / "cat.png")
    lines = [
        {"question": "What is this?", "image": "cat.png", "id": "x1"},
        {"question": "Are these two the same picture?", "image": ["cat.png", "cat.png"]},
        {"question": "Hello,\u2028you!", "image": None},
    ]
    file = tmp_path / "questions.jsonl"
    text = "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    file.write_text(text, encoding="utf-8-sig")
    args = ["--ckpt", str(tiny_ckpt), "--questions", str(file), "--max-new-tokens", "8"]
    answers = []
    for batch_size in ("2", "3"):
        out = tmp_path / f"answers{batch_size}.jsonl"
        assert sample.main([*args, "--batch-size", batch_size, "--out", str(out)]) == 0
        lines_out = out.read_text("utf-8").rstrip("\n").split("\n")
        answers.append([json.loads(line) for line in lines_out])
    assert answers[0] == answers[1]
    assert [a["question"] for a in answers[0]] == [line["question"] for line in lines]
    assert answers[0][0]["id"] == "x1" and all(a["answer"] for a in answers[0])
    assert not list(tmp_path.glob("*.tmp"))
    capsys.readouterr()
    assert sample.main([*args[:2], "--image", str(tmp_path / "cat.png"), *args[4:],
                        "--question", "What is this?"]) == 0  # fmt: skip
    assert capsys.readouterr().out.strip() == answers[0][0]["answer"]


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": 5}', 'expected {"question": TEXT, "image": FILE or [FILE, ...]}.'),
        ('{"question": "x", "image": [7]}', "expected {"),
        ('["x"]', "expected {"),
        ("x", "expected {"),
        ('{"question": " "}', "question is empty"),
        ('{"question": "x", "image": "none.png"}', "there is no image file"),
        ('{"question": "<image_placeholder> x"}', "1 <image_placeholder> but 0 images"),
        ('{"question": "<unk>"}', "token id 512"),
        ('{"question": "\\ud83d"}', "which is no character"),
    ],
)
def test_a_bad_line_is_named_before_the_first_answer(tiny_ckpt, line, message, tmp_path, capsys):
    file = tmp_path / "q.jsonl"
    file.write_text('{"question": "Hello!"}\n\n' + line, encoding="utf-8")
    out = tmp_path / "out"
    assert sample.main(["--ckpt", str(tiny_ckpt), "--questions", str(file), "--out", str(out)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"sample.py: {file}, line 3: ") and message in error
    assert not out.exists()


def test_answers_before_a_broken_image_are_not_lost(tiny_ckpt, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    file, out = tmp_path / "q.jsonl", tmp_path / "answers.jsonl"
    first = '{"question": "Hello!", "note": "\\ud83d"}'
    file.write_text(first + '\n{"question": "x", "image": "broken.png"}')
    args = ["--ckpt", str(tiny_ckpt), "--questions", str(file), "--out", str(out)]
    assert sample.main([*args, "--batch-size", "1", "--max-new-tokens", "8"]) == 2
    assert f"The 1 answers before it are in {out}.tmp." in capsys.readouterr().err
    answer = json.loads((tmp_path / "answers.jsonl.tmp").read_text("utf-8"))
    assert answer["answer"] and answer["note"] == "\ud83d"


def test_the_grid_shows_the_first_prompts_and_images(tiny_ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample, "GRID_PROMPTS", 2)
    monkeypatch.setattr(sample, "GRID_IMAGES", 1)
    args = ["--ckpt", str(tiny_ckpt), "--steps", "1", "--num", "2", "--out", str(tmp_path)]
    for prompt in "abc":
        args += ["--prompt", prompt]
    assert sample.main(args) == 0
    with Image.open(tmp_path / "grid.png") as image:
        assert image.height < 3 * 64 and image.width < 2 * 64
        assert image.info["prompts"] == "a\nb"
        grid = np.asarray(image)
    np.testing.assert_array_equal(grid[-64:], np.asarray(Image.open(tmp_path / "0001_000.png")))
    assert "6 images and grid.png (2 of them)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompt", "x", "--image", "cat.png"], "begins from --init-image"),
        (["--questions", "x.jsonl", "--image", "cat.png"], "--image is what a --question is about"),
        (["--questions", "x.jsonl", "--question", "x"], "not both"),
        (["--question", "x", "--init-image", "cat.png"], "--init-image is for drawing"),
        (["--question", "x", "--plan", "v5e-4"], "--plan is for drawing"),
        (["--prompt", "x", "--strength", "0.5"], "--strength says how much of --init-image"),
        (["--prompt", "x", "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_options_without_effect_are_refused(args, message, capsys):
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", "nowhere", *args])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompt", "x", "--steps", "0"], "steps must be"),
        (["--prompt", "x", "--prompt", ""], "prompt is empty"),
        (["--question", "x", "--image", "no.png"], "no image file"),
        (["--question", "x", "--question", " "], "question is empty"),
    ],
)
def test_what_files_and_options_tell_is_told_before_loading(
    tiny_ckpt, args, message, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(Pipeline, "from_checkpoint", None)
    assert sample.main(["--ckpt", str(tiny_ckpt), "--out", str(tmp_path), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sample.py: ") and message in error


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompt", " "], "prompt is empty"),
        (["--prompt", "<unk>"], "token id 512, but the model has only 512 embeddings"),
        (["--question", "<unk>"], "leave out such special tokens"),
        (["--prompt", "x", "--steps", "0"], "steps must be at least 1"),
        (["--prompt", "x", "--guidance", "nan"], "guidance_scale must be a number, not nan"),
        (["--prompt", "x", "--seed", str(2**32)], "seed must be from 0 to 4294967295"),
        (["--question", "x", "--seed", "-1"], "seed must be from 0 to 4294967295, not -1"),
        (["--question", "x", "--temperature", "inf"], "temperature must be a number, not inf"),
        (["--prompts", "docs/cat.jpg"], "docs/cat.jpg is not UTF-8 text"),
        (["--prompt", "x", "--num", "0"], "must be at least 1"),
        (["--prompt", "x", "--out", "README.md"], "README.md is no folder that can be written"),
        (["--questions", "README.md", "--out", "README.md/x"], "README.md is no folder that can"),
        (["--prompt", "x", "--raw"], "holds no training state: it was converted"),
        (["--prompt", "x", "--mesh", "data=1,tensor=2"], "for 2 devices, but there are 1."),
        (["--prompt", "x", "--mesh", "tensor=2"], "tensor=2 does not divide 1 devices."),
        (["--prompt", "x", "--mesh", "rows=2"], "as in data=2,tensor=4; it cannot be 'rows=2'"),
        (["--prompt", "x", "--guidance-interval", "1", "0"], "guidance interval"),
        (["--prompt", "x", "--init-image", "nowhere.png"], "no image file nowhere.png"),
        (["--prompt", "x", "--init-image", "README.md"], "README.md is not an image"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--question", " "], "question is empty"),
        (["--question", "x", "--question", "<image>?"], "but 0 images came with it: write one, or"),
        (["--question", "x", "--image", "docs"], "docs is a folder"),
        (["--question", "x", "--top-p", "0"], "top_p must be in"),
    ],
)
def test_bad_input_is_one_sentence(tiny_ckpt, args, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(REPO)
    assert sample.main(["--ckpt", str(tiny_ckpt), "--out", str(tmp_path / "out"), *args]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("sample.py: ") and message in error
    assert not (tmp_path / "out").exists()


def test_unknown_solver_lists_the_known_ones(tiny_ckpt, capsys):
    with pytest.raises(SystemExit):
        sample.main(["--ckpt", str(tiny_ckpt), "--prompt", "x", "--solver", "rk4"])
    # Newer Pythons leave the quotes out.
    assert "euler, heun, ab2" in capsys.readouterr().err.replace("'", "")


def test_wrong_folders_say_what_to_do(tmp_path, capsys):
    for folder, message in (
        (tmp_path / "nowhere", "no checkpoint folder"),
        (GOLDEN / "tiny", "python -m jflow.convert from-hf"),
        (tmp_path, "not a complete jflow checkpoint"),
    ):
        assert sample.main(["--ckpt", str(folder), "--prompt", "x"]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_without_vae_answers_but_does_not_draw(tmp_path, capsys):
    ckpt = str(tmp_path / "ckpt")
    assert convert(["from-hf", str(GOLDEN / "tiny"), "--out", ckpt]) == 0
    assert sample.main(["--ckpt", ckpt, "--prompt", "x", "--out", str(tmp_path / "o")]) == 2
    assert "no VAE" in capsys.readouterr().err
    assert sample.main(["--ckpt", ckpt, "--question", "x", "--max-new-tokens", "8"]) == 0


@pytest.mark.parametrize(
    "work", [["--prompt", "a cat", "--steps", "2", "--num", "2"], ["--question", "What?"]]
)
def test_the_second_start_compiles_nothing(tiny_ckpt, tmp_path, work):
    """Another prompt of about the same length included."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    compiled = []
    for turn in range(2):
        args = [*work[:1], work[1] + " red" * turn, *work[2:], "--out", str(tmp_path / "out")]
        done = subprocess.run(
            [sys.executable, "sample.py", "--ckpt", tiny_ckpt, "--max-new-tokens", "8", *args],
            cwd=REPO, env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        found = re.search(r"\((\d+) programs compiled, (\d+) from the cache\)", done.stderr)
        compiled.append([int(n) for n in found.groups()])
    assert compiled[0][0] > 0
    assert compiled[1] == [0, sum(compiled[0])]
