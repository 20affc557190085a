"""configs/finetune.py on a folder of a user's pictures, through train.py as a user starts it."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image

import train
from jflow import checkpoints
from jflow.config import load
from jflow.convert.__main__ import main as convert
from jflow.inference.pipeline import ImageOptions, Pipeline
from jflow.training import runs
from jflow.training.optimizer import PRETRAINING
from tests.goldens import REPO
from tests.test_train import contents

pytestmark = pytest.mark.usefixtures("quick_compiling")
CONFIG = str(REPO / "configs" / "finetune.py")
UND = "janusflow/vision_und_enc_aligner/kernel"
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Eight small pictures with captions, and a conversation about one of them."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour in COLOURS:
        Image.new("RGB", (90, 70), colour).save(folder / f"{colour}.png")
    captions = [{"image": f"{c}.png", "caption": f"all {c}"} for c in COLOURS]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "Red."}]
    (folder / "conversations.json").write_text(
        json.dumps([{"image": "red.png", "conversations": turns}])
    )
    return folder


@pytest.fixture(scope="module")
def start(pictures, tiny_ckpt):
    """Runs the config on the tiny checkpoint."""
    small = [f"folder={pictures}", f"init_from={tiny_ckpt}", "dtype=float32", "remat=none",
             "data.batch_rows=2", "data.max_seq_len=128", "data.images_per_row=1",
             "data.crops_per_row=1", "ema.decay=0.5", "optimizer.learning_rate=1e-2",
             "optimizer.warmup_steps=1", "log_every=1",
             *(f"data.{task}.{name}=1" for task in ("understanding", "generation")
               for name in ("samples", "rows"))]  # fmt: skip

    def run(folder, *more) -> None:
        assert train.main(["--config", CONFIG, "--run", str(folder), *small, *more]) == 0

    return run


@pytest.fixture(scope="module")
def lora_run(start, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora") / "run"
    start(run, "steps=4", "save_every=2")
    return run


def params_of(path) -> dict:
    params, _, _ = checkpoints.load_checkpoint(path)
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(params, sep="/").items()}


def moved(before: dict, after: dict) -> set[str]:
    """Paths of what the run has changed; the tree is the same, without a REPA head."""
    assert after.keys() == before.keys()
    return {path for path in before if np.any(before[path] != after[path])}


def works(run, tmp_path) -> None:
    """The last checkpoint draws, and is read by the released format's readers."""
    pipeline = Pipeline.from_checkpoint(run)
    (images,) = pipeline.generate(["all red"], num=1, options=ImageOptions(steps=1))
    assert images.shape == (1, 64, 64, 3)
    hf, back = str(tmp_path / "hf"), str(tmp_path / "back")
    assert convert(["to-hf", str(run), "--out", hf]) == 0
    assert convert(["from-hf", hf, "--vae", f"{hf}/vae", "--out", back]) == 0
    again, want = params_of(back), params_of(run)
    for path in again:
        np.testing.assert_array_equal(again[path], want[path])


def test_lora_moves_the_aligners_and_the_matrices_of_the_blocks(lora_run, tiny_ckpt, tmp_path):
    changed = moved(params_of(tiny_ckpt), params_of(lora_run))
    blocks = "janusflow/language_model/layers/block"
    kernels = {f"{blocks}/self_attn/{n}_proj/kernel" for n in "qkvo"}
    kernels |= {f"{blocks}/mlp/{n}_proj/kernel" for n in ("gate", "up", "down")}
    aligners = {"janusflow/beg_of_und_embed"} | {
        f"janusflow/vision_{n}_aligner/{leaf}"
        for n in ("und_enc", "gen_enc", "gen_dec")
        for leaf in ("kernel", "bias")
    }
    aligners.add("janusflow/vision_gen_dec_aligner_norm/scale")
    assert changed == kernels | aligners
    before, after = params_of(tiny_ckpt), params_of(lora_run)
    up = f"{blocks}/mlp/up_proj/kernel"
    # Rank 16 of 64 in each layer, up to the rounding of the sum.
    values = np.linalg.svd(after[up] - np.float64(before[up]), compute_uv=False)
    assert np.all(values[:, 15] > 1e-5) and np.all(values[:, 16:] < 1e-6)
    works(lora_run, tmp_path)


def test_a_lora_run_continues_bit_for_bit(start, lora_run, tmp_path):
    """Parameters, factors and their averages, moments: what step 2 left is all that is needed."""
    run = tmp_path / "run"
    shutil.copytree(lora_run / "00000002", run / "00000002")
    start(run, "steps=4")
    one, two = params_of(run), params_of(lora_run)
    for path in two:
        np.testing.assert_array_equal(one[path], two[path])

    jax.tree.map(np.testing.assert_array_equal, contents(run, 4), contents(lora_run, 4))


def test_raw_factors_are_merged_like_their_average(lora_run):
    """Kernels below the factors, plus 2 (alpha / rank) A B of the state; aligners as they are."""
    params, config, _ = runs.load_raw(lora_run)
    averaged, state = contents(lora_run, 4)
    averaged, raw = flatten_dict(averaged, sep="/"), flatten_dict(params, sep="/")
    assert raw.keys() == averaged.keys() and config["train"]["lora"]["rank"] == 16
    up = "janusflow/language_model/layers/block/mlp/up_proj"
    a, b = (state[f"params.{up}/lora_{n}"] for n in "ab")
    want = state[f"lora.{up}/kernel"] + 2 * np.float64(a) @ b
    np.testing.assert_allclose(raw[f"{up}/kernel"], want, atol=1e-6)
    assert np.abs(raw[f"{up}/kernel"] - averaged[f"{up}/kernel"]).max() > 1e-5
    bias = "janusflow/vision_gen_enc_aligner/bias"
    np.testing.assert_array_equal(raw[bias], state[f"params.{bias}"])
    still = "vae/encoder/conv_in/kernel"
    np.testing.assert_array_equal(raw[still], averaged[still])


def test_full_fine_tuning_moves_all_but_siglip_and_the_vae(start, tiny_ckpt, tmp_path):
    run = tmp_path / "run"
    start(run, "steps=2", "lora=false")
    changed = moved(params_of(tiny_ckpt), params_of(run))
    still = {path for path in params_of(tiny_ckpt) if path not in changed}
    parts = ("vae/", "janusflow/vision_und_enc_model/")
    assert all(path.startswith(parts) for path in still)
    assert not any(path.startswith(parts) for path in changed)
    works(run, tmp_path)


def test_the_folder_is_one_override(pictures, tmp_path):
    config = load(CONFIG, [f"folder={pictures}", "optimizer.warmup_steps=7"])
    tasks = [(source.task, source.path[len(str(pictures)) :]) for source in config.data.sources]
    assert tasks == [
        ("understanding", "/captions.jsonl"),
        ("generation", "/captions.jsonl"),
        ("understanding", "/conversations.json"),
    ]
    assert config.lora is not None and config.optimizer.warmup_steps == 7
    plain = load(CONFIG, [f"folder={tmp_path}", "lora=false"])
    assert len(plain.data.sources) == 2 and plain.lora is None
    assert plain.trainable == PRETRAINING and plain.objective.repa_weight == 0
    assert plain.optimizer.learning_rate < config.optimizer.learning_rate


def test_conversations_alone_are_enough(start, pictures, tiny_ckpt, tmp_path):
    """For understanding: what draws stays as it is, to the rounding of its average."""
    (tmp_path / "red.png").write_bytes((pictures / "red.png").read_bytes())
    (tmp_path / "conversations.json").write_text((pictures / "conversations.json").read_text())
    run = tmp_path / "run"
    start(run, "steps=2", f"folder={tmp_path}")
    before, after = params_of(tiny_ckpt), params_of(run)
    assert np.abs(after[UND] - before[UND]).max() > 1e-3
    for path in (path for path in before if "_gen_" in path):
        np.testing.assert_allclose(after[path], before[path], rtol=1e-6, atol=0)


def test_a_folder_without_captions_is_one_sentence(tiny_ckpt, tmp_path, capsys):
    arguments = ["--config", CONFIG, "--run", str(tmp_path / "run"), f"init_from={tiny_ckpt}"]
    assert train.main([*arguments, f"folder={tmp_path}"]) == 2
    assert f"no .jsonl file at {tmp_path}/captions.jsonl" in capsys.readouterr().err
    assert train.main([*arguments, "lora=perhaps"]) == 2
    assert "'perhaps' cannot be read as bool" in capsys.readouterr().err
