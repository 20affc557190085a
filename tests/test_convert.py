"""Conversion: every bit of every tensor and file, both ways, and what is refused."""

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from jflow import checkpoints
from jflow.convert.__main__ import CONFIG, SIGLIP, janusflow_leaves, main, vae_leaves
from jflow.convert.engine import flatten
from jflow.models.janusflow import JanusFlowConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import VAEConfig
from tests.goldens import GOLDEN
from tests.test_convert_engine import equal_bits

TINY, VAE = GOLDEN / "tiny", GOLDEN / "vae_tiny"
VAE_FILE = "diffusion_pytorch_model.safetensors"


def as_bfloat16(source: Path, target: Path) -> Path:
    """A copy of a checkpoint folder with bfloat16 tensors, some bits of them not numbers."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        arrays = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(file).items()}
        first = arrays[min(arrays)]
        first.reshape(-1)[:4] = [np.nan, -np.inf, -0.0, 1e-40]
        save_file(arrays, file, {"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hf_to_jflow_to_hf_is_bit_exact(tmp_path, dtype):
    source, vae = TINY, VAE
    if dtype == "bfloat16":
        source, vae = as_bfloat16(TINY, tmp_path / "src"), as_bfloat16(VAE, tmp_path / "vae")
    ckpt, out = str(tmp_path / "ckpt"), tmp_path / "hf"
    assert main(["from-hf", str(source), "--vae", str(vae), "--out", ckpt]) == 0
    params, _, _ = checkpoints.load_checkpoint(ckpt)
    assert {str(array.dtype) for _, array in flatten(params)} == {dtype}
    assert main(["to-hf", ckpt, "--out", str(out)]) == 0
    equal_bits(load_file(out / "model.safetensors"), load_file(source / "model.safetensors"))
    equal_bits(load_file(out / "vae" / VAE_FILE), load_file(vae / VAE_FILE))
    texts = {file.name: file.read_bytes() for file in source.glob("*.json")}
    assert {file.name: file.read_bytes() for file in out.glob("*.json")} == texts
    assert (out / "vae" / CONFIG).read_bytes() == (vae / CONFIG).read_bytes()


def test_values_land_where_the_reference_has_them(tmp_path):
    """Against the layouts written out by hand, not by the table."""
    ckpt = tmp_path / "ckpt"
    assert main(["from-hf", str(TINY), "--out", str(ckpt)]) == 0
    params, _, _ = checkpoints.load_checkpoint(ckpt)
    ours, hf = params["janusflow"], load_file(TINY / "model.safetensors")
    layers = ours["language_model"]["layers"]["block"]
    np.testing.assert_array_equal(
        layers["mlp"]["up_proj"]["kernel"][2],
        hf["language_model.model.layers.2.mlp.up_proj.weight"].T,
    )
    np.testing.assert_array_equal(
        ours["vision_und_enc_model"]["patch_embed_kernel"],
        hf["vision_und_enc_model.vision_tower.patch_embed.proj.weight"].transpose(2, 3, 1, 0),
    )
    np.testing.assert_array_equal(
        ours["vision_gen_dec_model"]["mid_block"]["res_blocks_1"]["depthwise_kernel"],
        hf["vision_gen_dec_model.mid_block.res_blocks.1.depthwise.weight"][:, 0].transpose(1, 2, 0),
    )


def test_line_ends_and_unicode_of_files_survive(tmp_path):
    source = shutil.copytree(TINY, tmp_path / "src")
    text = '{\r\n "é": "\u2028 \\ud83d",\t"<｜begin▁of▁sentence｜>": 1}\n\n'.encode()
    (source / "extra.json").write_bytes(text)
    assert main(["from-hf", str(source), "--out", str(tmp_path / "ckpt")]) == 0
    assert main(["to-hf", str(tmp_path / "ckpt"), "--out", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "extra.json").read_bytes() == text


def test_config_is_generated_where_none_travelled(tmp_path):
    ckpt, out = tmp_path / "ckpt", tmp_path / "hf"
    assert main(["from-hf", str(TINY), "--vae", str(VAE), "--out", str(ckpt)]) == 0
    params, config, _ = checkpoints.load_checkpoint(ckpt)
    checkpoints.save_checkpoint(tmp_path / "own", params, config, {})
    assert main(["to-hf", str(tmp_path / "own"), "--out", str(out)]) == 0
    config, siglip = (json.loads((out / name).read_text()) for name in (CONFIG, SIGLIP))
    want = json.loads((TINY / CONFIG).read_text()), json.loads((TINY / SIGLIP).read_text())
    assert JanusFlowConfig.from_hf(config, siglip) == JanusFlowConfig.from_hf(*want)
    written, given = ((folder / CONFIG).read_text() for folder in (out / "vae", VAE))
    assert json.loads(written) == json.loads(given)
    # And the VAE is found where it was put.
    assert main(["from-hf", str(out), "--out", str(tmp_path / "2")]) == 0
    assert checkpoints.load_checkpoint(tmp_path / "2")[0].keys() == {"janusflow", "vae"}


def test_legacy_vae_names_are_read(tmp_path):
    new_to_old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    arrays, want = {}, load_file(VAE / VAE_FILE)
    for name, array in want.items():
        for new, old in new_to_old.items():
            name = name.replace(new, old)
        arrays[name] = array
    assert arrays.keys() != want.keys()
    vae = shutil.copytree(VAE, tmp_path / "vae")
    save_file(arrays, vae / VAE_FILE)
    assert main(["from-hf", str(TINY), "--vae", str(vae), "--out", str(tmp_path / "ckpt")]) == 0
    assert main(["to-hf", str(tmp_path / "ckpt"), "--out", str(tmp_path / "hf")]) == 0
    equal_bits(load_file(tmp_path / "hf" / "vae" / VAE_FILE), want)


def full_keys(name: str) -> tuple[dict, dict]:
    """(config, {key: shape}) of a full-size checkpoint."""
    listed = json.loads((GOLDEN / f"keys_{name}.json").read_text())
    return listed["config"], {key: tuple(shape) for key, shape in listed["keys"].items()}


def test_what_a_config_leaves_out_is_the_released_codes_default():
    """uvit.py's classes, and SigLIPVisionCfg for a SigLIP whose sizes are given in part."""
    config, _ = full_keys("janusflow_1p3b")
    bare = config | {"vision_gen_enc_config": {}, "vision_gen_dec_config": {"params": None}}
    found = JanusFlowConfig.from_hf(bare, {"width": 96, "heads": 6})
    assert (found.gen_encoder, found.gen_decoder) == (GenEncoderConfig(), GenDecoderConfig())
    vit = found.siglip
    assert (vit.width, vit.heads, vit.patch_size, vit.layers) == (96, 6, 14, 27)
    assert vit.mlp_width == int(96 * 3.7362)
    for wrong in (None, [], "uvit"):
        with pytest.raises(ValueError, match="not a JanusFlow"):
            JanusFlowConfig.from_hf(config | {"vision_gen_enc_config": wrong})


def test_full_size_keys_and_shapes():
    config, want = full_keys("janusflow_1p3b")
    leaves = janusflow_leaves(JanusFlowConfig.from_hf(config))
    assert {key: leaf.hf_shape for leaf in leaves for key in leaf.keys} == want
    config, want = full_keys("sdxl_vae")
    leaves = vae_leaves(VAEConfig.from_hf(config))
    assert {key: leaf.hf_shape for leaf in leaves for key in leaf.keys} == want


def broken_sources():
    def truncated(folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1000])

    def without_config(folder):
        (folder / CONFIG).unlink()

    def other_config(folder):
        (folder / CONFIG).write_text('{"model_type": "llama"}')

    def broken_json(folder):
        (folder / "tokenizer.json").write_text('{"a": ')

    def without_weights(folder):
        (folder / "model.safetensors").unlink()

    def smaller(folder):
        config = json.loads((folder / CONFIG).read_text())
        config["language_config"]["num_hidden_layers"] = 3
        (folder / CONFIG).write_text(json.dumps(config))

    return {
        truncated: "model.safetensors is truncated or damaged",
        without_config: "There is no config.json",
        other_config: "not a JanusFlow",
        broken_json: "tokenizer.json is not valid JSON",
        without_weights: "with the library it came from (transformers, diffusers)",
        smaller: "unexpected: language_model.model.layers.3.mlp.down_proj.weight",
    }


@pytest.mark.parametrize(
    "damage, message",
    [pytest.param(*case, id=case[0].__name__) for case in broken_sources().items()],
)
def test_broken_sources_leave_nothing(tmp_path, capsys, damage, message):
    source = shutil.copytree(TINY, tmp_path / "src")
    damage(source)
    assert main(["from-hf", str(source), "--out", str(tmp_path / "ckpt")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert [file.name for file in tmp_path.iterdir()] == ["src"]


def test_a_download_that_fails_is_one_sentence(tmp_path, capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert main(["from-hf", "nobody/nothing", "--out", str(tmp_path / "ckpt")]) == 2
    error = capsys.readouterr().err
    assert "nobody/nothing is not a folder" in error and "no network\n" in error
    assert not list(tmp_path.iterdir())


def test_any_usual_file_of_a_vae_on_the_hub_is_fetched(tmp_path, monkeypatch):
    """Such as half precision alone, but no second copy under another name."""
    repository = shutil.copytree(VAE, tmp_path / "vae")
    (repository / VAE_FILE).rename(repository / "diffusion_pytorch_model.fp16.safetensors")
    (repository / "sdxl_vae.safetensors").write_bytes(b"the same weights under other names")

    def download(source, allow_patterns):
        def others(_, names):
            return set(names) - set(filter_repo_objects(names, allow_patterns=allow_patterns))

        return shutil.copytree(repository, tmp_path / "cache", ignore=others)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    ckpt = tmp_path / "ckpt"
    assert main(["from-hf", str(TINY), "--vae", "some/vae", "--out", str(ckpt)]) == 0
    assert "vae" in checkpoints.load_checkpoint(ckpt)[0]


def test_problems_of_both_models_are_listed(tmp_path, capsys):
    source, vae = shutil.copytree(TINY, tmp_path / "src"), shutil.copytree(VAE, tmp_path / "vae")
    for folder, key in ((source, "lost"), (vae, "stray")):
        file = next(folder.glob("*.safetensors"))
        save_file(load_file(file) | {key: np.zeros(1, np.float32)}, file)
    arguments = ["from-hf", str(source), "--vae", str(vae), "--out", str(tmp_path / "ckpt")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "unexpected: lost" in error and "unexpected: stray" in error


def test_weights_that_nothing_runs_with_are_said_to_be(tmp_path, capsys):
    source = shutil.copytree(TINY, tmp_path / "src")
    (source / "tokenizer.json").unlink()
    assert main(["from-hf", str(source), "--out", str(tmp_path / "ckpt")]) == 0
    assert "nothing will run with" in (said := capsys.readouterr().err)
    assert "holds no tokenizer.json" in said


def test_without_a_vae_it_is_said_that_nothing_will_be_drawn(tmp_path, capsys):
    assert main(["from-hf", str(TINY), "--out", str(tmp_path / "ckpt")]) == 0
    assert "ckpt will not draw. This checkpoint has no VAE" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(tmp_path, capsys, monkeypatch):
    async def full(*args):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpoints._LaterHandler, "_write", full)
    assert main(["from-hf", str(TINY), "--out", str(tmp_path / "ckpt")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "ckpt cannot be written: make room" in error and "No space left" in error
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    ckpt = tmp_path / "ckpt"
    assert main(["from-hf", str(TINY), "--out", str(ckpt)]) == 0

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jflow.convert.__main__.write_params", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(["to-hf", str(ckpt), "--out", str(tmp_path / "hf")])
    assert list(tmp_path.iterdir()) == [ckpt]


def peak_gigabytes(arguments: list[str]) -> float:
    """Peak memory of a conversion in a process of its own; ru_maxrss would count this one's too."""
    code = (
        "import sys; from jflow.convert.__main__ import main\n"
        "status = main(sys.argv[1:])\n"
        "print(next(x for x in open('/proc/self/status') if x.startswith('VmHWM')).split()[1])\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1]) * 1024 / 1e9


def checksums(folder: Path) -> dict[str, int]:
    return {
        name: zlib.crc32(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.fixture
def scratch(tmp_path):
    """A folder that goes at once: pytest would keep its gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_full_size_conversion_is_exact_and_fits_in_memory(scratch):
    """2.05 B bfloat16 parameters in shards and the float32 VAE: within half of their size."""
    config, shapes = full_keys("janusflow_1p3b")
    source, vae, out = scratch / "src", scratch / "vae", scratch / "hf"
    vae_config, vae_shapes = full_keys("sdxl_vae")
    rng, size = np.random.default_rng(0), 0
    for folder, dtype, listed, shards in (
        (source, ml_dtypes.bfloat16, shapes, 8),
        (vae, np.float32, vae_shapes, 1),
    ):
        folder.mkdir()
        (folder / CONFIG).write_text(json.dumps(config if folder is source else vae_config))
        for n in range(shards):
            part = {
                name: rng.standard_normal(listed[name], np.float32).astype(dtype)
                for name in sorted(listed)[n::shards]
            }
            size += sum(array.nbytes for array in part.values()) / 1e9
            name = VAE_FILE if shards == 1 else f"model-{n}.safetensors"
            save_file(part, folder / name)
            del part
    want, want_vae = checksums(source), checksums(vae)
    ckpt = str(scratch / "ckpt")
    reading = peak_gigabytes(["from-hf", str(source), "--vae", str(vae), "--out", ckpt])
    writing = peak_gigabytes(["to-hf", ckpt, "--out", str(out)])
    print(f"{size:.2f} GB: peak {reading:.2f} GB from HF, {writing:.2f} GB to HF")
    assert checksums(out) == want and checksums(out / "vae") == want_vae
    assert max(reading, writing) <= size / 2
