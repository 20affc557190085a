"""The conversion engine on toy rules: every bit both ways, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jflow.convert.engine import Rule, find_tensors, flatten, open_params, plan, write_params

RULES = (
    Rule("model.layers.{l}.up.weight", "layers/up/kernel", "o i -> i o"),
    Rule("blocks.{i}.convs.{j}.weight", "blocks_{i}/convs_{j}/kernel", "o i h w -> h w i o"),
    Rule("blocks.{i}.norm.weight", "blocks_{i}/scale", "1 1 c -> c"),
)


def toy(layers: int, blocks: int, size: int, dtype) -> tuple[dict, dict]:
    """(tree, the tensors it must come from), made of independent random numbers."""
    rng = np.random.default_rng([layers, blocks, size])
    hf = {
        f"model.layers.{layer}.up.weight": rng.standard_normal((size + 1, size)).astype(dtype)
        for layer in range(layers)
    }
    tree = {
        "layers": {
            "up": {"kernel": np.stack([hf[f"model.layers.{n}.up.weight"].T for n in range(layers)])}
        }
    }
    for i in range(blocks):
        norm = rng.standard_normal((1, 1, size)).astype(dtype)
        convs = rng.standard_normal((2, size, 2, 3, 1)).astype(dtype)
        hf[f"blocks.{i}.norm.weight"] = norm
        tree[f"blocks_{i}"] = {"scale": norm[0, 0]}
        for j, conv in enumerate(convs):
            hf[f"blocks.{i}.convs.{j}.weight"] = conv
            tree[f"blocks_{i}"][f"convs_{j}"] = {"kernel": conv.transpose(2, 3, 1, 0)}
    return tree, hf


def equal_bits(got: dict, want: dict):
    """The same names, dtypes, shapes and bits (NaN and -0 included)."""
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert np.ascontiguousarray(got[name]).tobytes() == array.tobytes(), name


@settings(max_examples=20, deadline=None)
@given(
    layers=st.integers(1, 4),
    blocks=st.integers(0, 12),
    size=st.integers(1, 5),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    shards=st.integers(1, 3),
)
def test_toy_rules_both_ways(tmp_path_factory, layers, blocks, size, dtype, shards):
    folder = tmp_path_factory.mktemp("toy")
    tree, hf = toy(layers, blocks, size, dtype)
    names = sorted(hf)
    for n in range(shards):
        part = {name: np.ascontiguousarray(hf[name]) for name in names[n::shards]}
        save_file(part, folder / f"model-{n}.safetensors")
    leaves = plan(RULES, tree)
    params = open_params(leaves, find_tensors(folder))
    read = {path: np.asarray(later) for path, later in flatten(params)}
    equal_bits(read, dict(flatten(tree)))
    write_params(leaves, params, folder / "written")
    equal_bits(load_file(folder / "written"), hf)
    with safe_open(folder / "written", "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it
    assert not list(folder.glob("*.tmp"))


def test_each_parameter_needs_exactly_one_rule():
    tree, _ = toy(2, 1, 3, np.float32)
    with pytest.raises(ValueError, match="blocks_0/scale has 0 rules"):
        plan(RULES[:2], tree)
    with pytest.raises(ValueError, match="layers/up/kernel has 2 rules"):
        plan((*RULES, RULES[0]), tree)


def test_everything_wrong_is_listed_at_once(tmp_path, monkeypatch):
    tree, hf = toy(3, 1, 4, np.float32)
    del hf["model.layers.1.up.weight"], hf["blocks.0.convs.0.weight"]
    hf["model.layers.2.up.weight"] = hf["model.layers.2.up.weight"].astype(np.float16)
    hf["blocks.0.convs.1.weight"] = np.zeros((4, 2, 3, 2), np.float32)
    hf["blocks.0.norm.weight"] = np.zeros((1, 1, 4), np.int32)
    hf["stray"] = np.zeros(1, np.float32)
    save_file(hf, tmp_path / "model.safetensors")
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("allocated before checking"))
    with pytest.raises(ValueError) as error:
        open_params(plan(RULES, tree), find_tensors(tmp_path))
    for problem in (
        "missing: model.layers.1.up.weight",
        "missing: blocks.0.convs.0.weight",
        "several dtypes: model.layers.0.up.weight to model.layers.2.up.weight are ['F16', 'F32']",
        "wrong shape: blocks.0.convs.1.weight is [4, 2, 3, 2], expected [4, 2, 3, 1]",
        "unsupported dtype: blocks.0.norm.weight is I32",
        "unexpected: stray",
    ):
        assert problem in str(error.value)
    assert len(str(error.value).splitlines()) == 7


def test_a_key_in_two_shards_is_refused(tmp_path):
    for n in range(2):
        save_file({"a": np.zeros(n + 1, np.float32)}, tmp_path / f"model-{n}.safetensors")
    with pytest.raises(ValueError, match="a is in .*model-0.* and again in .*model-1"):
        find_tensors(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model-0.safetensors")
    with pytest.raises(FileNotFoundError, match="model-1.safetensors.* does not exist"):
        find_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        find_tensors(tmp_path)


def test_other_files_beside_the_usual_name_are_left_alone(tmp_path):
    # stabilityai/sdxl-vae has the same weights again, under other names.
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"b": np.zeros(1, np.float32)}, tmp_path / "sdxl_vae.safetensors")
    assert list(find_tensors(tmp_path)) == ["a"]


def test_one_whole_file_comes_before_an_index_and_its_name_decides(tmp_path):
    """As transformers chooses: a model saved again leaves its former shards behind."""
    index = json.dumps({"weight_map": {"b": "b.safetensors"}})
    for name in ("model.fp16", "other"):
        (tmp_path / f"{name}.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="several indices, model.fp16.safetensors.index.json, oth"):
        find_tensors(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    save_file({"b": np.zeros(1, np.float32)}, tmp_path / "b.safetensors")
    assert list(find_tensors(tmp_path)) == ["b"]
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    assert list(find_tensors(tmp_path)) == ["a"]


def test_writing_refuses_other_parameters(tmp_path):
    tree, _ = toy(2, 1, 3, np.float32)
    leaves = plan(RULES, tree)
    tree["extra"] = tree["blocks_0"].pop("scale")
    with pytest.raises(ValueError, match="blocks_0/scale has shape None.*unexpected extra"):
        write_params(leaves, tree, tmp_path / "file")
    assert not list(tmp_path.iterdir())
