"""The table of axes, the meshes that are refused, and the same numbers on every mesh."""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jflow import sharding
from jflow.models import repa
from jflow.models.janusflow import JanusFlow, JanusFlowConfig, init_params
from jflow.models.llama import LlamaConfig, unstack_layers
from jflow.models.siglip import SiglipConfig
from jflow.models.uvit import GenDecoderConfig, GenEncoderConfig
from jflow.models.vae import AutoencoderKL, VAEConfig
from jflow.sharding import MeshConfig, make_mesh, shardings
from jflow.training import optimizer
from jflow.training import state as states
from jflow.training.optimizer import OptimizerConfig
from tests import virtual

# The released model (reference.md).
RELEASED = JanusFlowConfig(
    language=LlamaConfig(102400, 2048, 5632, 24, 16, 16, max_position_embeddings=16384),
    siglip=SiglipConfig(),
    gen_encoder=GenEncoderConfig(input_channels=4, kernel_size=2, stride=2, padding=0),
    gen_decoder=GenDecoderConfig(out_channels=4, upsamples=1),
)


def mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def released() -> dict:
    key = jax.random.key(0)
    vae, head = AutoencoderKL(VAEConfig()), repa.RepaHead(1024)
    pixels = jnp.zeros((1, 32, 32, 3))
    return {
        "janusflow": jax.eval_shape(lambda: init_params(JanusFlow(RELEASED), key)),
        "vae": jax.eval_shape(lambda: vae.init(key, pixels))["params"],
        "repa": jax.eval_shape(lambda: repa.init_params(head, 2048, key)),
    }


def bytes_of(tree, place) -> int:
    """What one device holds of a tree."""
    sizes = jax.tree.map(
        lambda leaf, where: math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        place,
    )
    return sum(jax.tree.leaves(sizes))


def test_the_language_model_lies_as_the_table_says(released):
    found = shardings(released, mesh(2, 4, 2))["janusflow"]["language_model"]
    block = found["layers"]["block"]
    fsdp, tensor = ("fsdp",), ("tensor",)
    assert found["embed_tokens"].spec == PartitionSpec(tensor, fsdp)
    assert found["lm_head"]["kernel"].spec == PartitionSpec(fsdp, tensor)
    assert block["self_attn"]["q_proj"]["kernel"].spec == PartitionSpec(None, fsdp, tensor)
    assert block["self_attn"]["o_proj"]["kernel"].spec == PartitionSpec(None, tensor, fsdp)
    assert block["mlp"]["down_proj"]["kernel"].spec == PartitionSpec(None, tensor, fsdp)
    assert found["norm"]["scale"].spec == PartitionSpec(None)


@pytest.mark.parametrize("sizes", [(1, 16, 1), (1, 64, 1), (1, 256, 1), (4, 16, 4), (2, 4, 8)])
def test_a_device_holds_its_share_of_the_whole_state(released, sizes):
    """Parameters, moments, average: at most a twentieth more than an equal share."""

    def begin(params):
        return states.init(params, optimizer.SFT, optimizer.adamw(OptimizerConfig()))

    state = jax.eval_shape(begin, released)
    place = shardings(state, mesh(*sizes))
    leaves = zip(jax.tree.leaves(state), jax.tree.leaves(place), strict=True)
    kept = [math.prod(leaf.shape) for leaf, where in leaves if where.is_fully_replicated]
    assert max(kept) < sharding.SMALL
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    # SigLIP's and the smaller parts' products are not split by `tensor`.
    share = whole / (sizes[1] * sizes[2])
    assert bytes_of(state, place) < (1.1 if sizes[2] == 1 else 2.0) * share + 2**26
    for tree in (place.ema, place.opt_state[1][0].mu, place.opt_state[1][0].nu):
        assert tree == place.params
    assert place.step.spec == place.guard.mean.spec == PartitionSpec()


def test_the_table_covers_unstacked_layers_and_names_what_it_does_not_cover(released):
    language = jax.tree.map(lambda a: np.zeros((2, 1, 1)), released["janusflow"]["language_model"])
    flat = {"janusflow": {"language_model": unstack_layers(language)}}
    shardings(flat, mesh(1, 1, 1))
    with pytest.raises(ValueError, match=r"not so for janusflow/lora/a, vae/new/kernel\.$"):
        shardings(flat | {"vae": {"new": {"kernel": 1}}, "janusflow/lora/a": 1}, mesh(1, 1, 1))


def test_every_row_of_the_table_is_used(released):
    paths = ["/".join(k.key for k in keys)
             for keys, _ in jax.tree_util.tree_flatten_with_path(released)[0]]  # fmt: skip
    paths.append("janusflow/language_model/layers/block/self_attn/q_proj/lora_a")
    for row, _ in sharding.PARAMETER_AXES:
        assert any(re.fullmatch(row, path) for path in paths), row


def test_large_arrays_that_do_not_divide_are_refused_and_small_ones_stay_whole(released):
    sentence = (
        r"Dimension vocab = 102400 of janusflow/language_model/embed_tokens \[102400, 2048\] does "
        r"not divide over mesh.tensor=3\."
    )
    with pytest.raises(ValueError, match=sentence):
        shardings(released, mesh(1, 1, 3))
    small = {"repa": {"linear_1": {"kernel": jax.ShapeDtypeStruct((6, 6), jnp.float32)}}}
    assert shardings(small, mesh(1, 4, 1))["repa"]["linear_1"]["kernel"].is_fully_replicated
    sharding.check_heads(16, 8, mesh(1, 1, 8))
    with pytest.raises(ValueError, match="num_key_value_heads 8 does not divide over"):
        sharding.check_heads(16, 8, mesh(1, 1, 16))


def test_meshes_take_all_devices_or_are_refused():
    devices = jax.devices()[:1]
    assert dict(make_mesh(MeshConfig(), devices).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    for config, sentence in (
        (MeshConfig(data=2), "mesh.fsdp cannot take the rest: data=2 x tensor=1 does not divide 1"),
        (MeshConfig(1, 2, 1), "The mesh data=1 x fsdp=2 x tensor=1 is for 2 devices, but"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            make_mesh(config, devices)
    with pytest.raises(ValueError, match="mesh.tensor must be at least 1, or -1"):
        MeshConfig(tensor=0)
    with pytest.raises(ValueError, match="Only one size of the mesh can be -1"):
        MeshConfig(data=-1)


@dataclass(frozen=True)
class OfASlice:
    """What a mesh asks of a device; two slices of a pod repeat their places."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "none"
    device_kind: str = "none"


def test_slices_share_rows_and_nothing_else():
    """Parameters are gathered inside of one, however the axes are cut."""
    devices = [OfASlice(number, number // 4) for number in range(8)]
    for sizes in ((2, 4, 1), (4, 1, 2), (8, 1, 1)):
        grid = make_mesh(MeshConfig(*sizes), devices).devices
        assert grid.shape == sizes and len({device.id for device in grid.flat}) == 8
        for part, half in enumerate(np.split(grid, 2)):
            assert {device.slice_index for device in half.flat} == {part}
    with pytest.raises(ValueError, match="mesh.data=1 does not divide over 2 slices"):
        make_mesh(MeshConfig(1, 8, 1), devices)


def test_batches_keep_their_rows():
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    rows = {"a": np.arange(6).reshape(3, 2), "b": None}
    placed = sharding.place_batch(rows, one)
    np.testing.assert_array_equal(placed["a"], rows["a"])
    assert placed["b"] is None and sharding.row_multiple(mesh(2, 4, 2)) == 8


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="A batch of 12 rows does not divide over mesh.data"):
        sharding.place_batch(np.zeros((12, 2)), mesh(2, 4, 1))


def test_training_is_the_same_on_eight_devices():
    virtual.run("training", (2, 2, 2))


@pytest.mark.slow
def test_a_batch_in_parts_is_the_same_on_eight_devices():
    virtual.run("parts", (2, 2, 2))


@pytest.mark.slow
def test_factors_learn_the_same_on_eight_devices():
    virtual.run("LoRA", (2, 2, 2), (1, 8, 1), (1, 1, 8))


def test_what_sample_py_draws_and_answers_is_the_same_on_eight_devices():
    virtual.run("sample.py", (2, 2, 2))


@pytest.mark.slow
def test_what_sample_py_draws_and_answers_does_not_depend_on_the_mesh():
    virtual.run("sample.py", (8, 1, 1), (1, 8, 1), (2, 1, 4), (1, 4, 2))


@pytest.mark.slow
@pytest.mark.parametrize("check", ["training", "sampling"])
def test_every_combination_of_axes_gives_the_same(check):
    assert len(virtual.ALL) == 20
    virtual.run(check, *virtual.ALL)
