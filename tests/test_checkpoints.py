"""Checkpoint folders: what comes back, and what is refused in one sentence."""

import errno
import gc
import shutil
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jflow import checkpoints
from jflow.convert.engine import flatten
from tests.goldens import GOLDEN

CONFIG = {"janusflow": {"hidden": 8, "eps": 1e-6}, "siglip": None}
FILES = {"tokenizer.json": '{\r\n"é": "｜▁"}\n', "vae/config.json": "{}"}


def params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    return {
        "janusflow": {
            "layers": {"kernel": normal((3, 5, 7)).astype(ml_dtypes.bfloat16)},
            "scale": normal(300_000).astype(np.float32),
            "zeros": np.zeros((2, 2), np.float32),
        },
        "vae": {"kernel": normal((2, 2, 3, 4)).astype(np.float16)},
    }


def assert_same(got: dict, want: dict):
    got, want = dict(flatten(got)), dict(flatten(want))
    assert got.keys() == want.keys()
    for path, array in want.items():
        assert isinstance(got[path], jax.Array)
        assert got[path].dtype == array.dtype, path
        np.testing.assert_array_equal(np.asarray(got[path]), np.asarray(array))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ckpt"
    checkpoints.save_checkpoint(path, params(), CONFIG, FILES)
    return path


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_everything_comes_back(tmp_path, monkeypatch, make):
    monkeypatch.setattr(checkpoints, "GROUP_BYTES", 100)  # several groups
    path = tmp_path / "deep" / "ckpt"
    checkpoints.save_checkpoint(path, jax.tree.map(make, params()), CONFIG, FILES)
    got, config, files = checkpoints.load_checkpoint(path)
    assert_same(got, params())
    assert config == CONFIG and files == FILES
    assert checkpoints.read_metadata(path) == (CONFIG, FILES)
    assert list((tmp_path / "deep").iterdir()) == [path]


def test_what_is_later_is_in_memory_in_groups(tmp_path, monkeypatch):
    """Saved and opened, an array is gone before those of the group behind the next are read."""
    monkeypatch.setattr(checkpoints, "GROUP_BYTES", 1000)
    want = {"janusflow": {f"{i:02d}": np.full((75,), i, np.float32) for i in range(12)}}
    alive, most = weakref.WeakSet(), []

    class Read(np.ndarray):  # unlike its base, can be weakly referenced by a set
        __hash__ = object.__hash__

    def noted(array):
        copy = array.copy().view(Read)
        alive.add(copy)
        gc.collect()
        most.append(sum(x.nbytes for x in alive))
        return copy

    later = jax.tree.map(lambda x: checkpoints.Later(x.shape, x.dtype, lambda: noted(x)), want)
    checkpoints.save_checkpoint(tmp_path / "ckpt", later, CONFIG, FILES)
    assert len(most) == 12 and max(most) <= 1200
    assert_same(checkpoints.load_checkpoint(tmp_path / "ckpt")[0], want)

    restore, groups = checkpoints._restore_group, []
    monkeypatch.setattr(
        checkpoints, "_restore_group", lambda *a: groups.append(a[2].sum()) or restore(*a)
    )
    opened, config, files = checkpoints.open_checkpoint(tmp_path / "ckpt")
    assert (config, files) == (CONFIG, FILES) and not groups
    for (path, array), (name, expected) in zip(flatten(opened), flatten(want), strict=True):
        assert path == name and (array.shape, array.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(np.asarray(array), expected)
    assert len(groups) == 4 and sum(groups) == 12 and max(groups) <= 4


def test_without_files_and_vae(tmp_path):
    tree = {"janusflow": params()["janusflow"]}
    checkpoints.save_checkpoint(tmp_path / "ckpt", tree, {}, {})
    got, config, files = checkpoints.load_checkpoint(tmp_path / "ckpt")
    assert_same(got, tree)
    assert config == {} and files == {}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_restored_in_another_dtype(saved, dtype):
    got, _, _ = checkpoints.load_checkpoint(saved, dtype=dtype)
    assert_same(got, jax.tree.map(lambda x: x.astype(dtype), params()))


def test_restored_sharded(saved):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    for sharding in (place, jax.tree.map(lambda _: place, params())):
        got, _, _ = checkpoints.load_checkpoint(saved, sharding=sharding)
        assert_same(got, params())
        assert {array.sharding for _, array in flatten(got)} == {place}


def test_plain_orbax_reads_it(saved):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        got = checkpointer.restore(saved / "params")
    np.testing.assert_array_equal(got["janusflow"]["scale"], params()["janusflow"]["scale"])


def test_a_run_folder_gives_its_latest_whole_step(tmp_path):
    for step in (9, 10, 11):
        config = {"step": step}
        checkpoints.save_checkpoint(tmp_path / f"{step:08d}", params(step), config, FILES)
    # Two saves that were killed.
    (tmp_path / "00000011" / checkpoints.CHECKSUMS).unlink()
    shutil.copytree(tmp_path / "00000010", tmp_path / "00000012.orbax-checkpoint-tmp")
    got, config, _ = checkpoints.load_checkpoint(tmp_path)
    assert config == {"step": 10}
    assert_same(got, params(10))


def test_an_existing_folder_is_refused(saved):
    with pytest.raises(FileExistsError, match="exists already: choose another folder"):
        checkpoints.save_checkpoint(saved, params(1), CONFIG, FILES)
    assert_same(checkpoints.load_checkpoint(saved)[0], params())


def test_an_empty_folder_is_used(tmp_path):
    checkpoints.save_checkpoint(tmp_path, params(), CONFIG, FILES)
    assert_same(checkpoints.load_checkpoint(tmp_path)[0], params())


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch, stop):
    save = ocp.Checkpointer.save

    def interrupted(*args, **kwargs):
        save(*args, **kwargs)
        raise stop("No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupted)
    with pytest.raises(stop):
        checkpoints.save_checkpoint(tmp_path / "ckpt", params(), CONFIG, FILES)
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_says_so(tmp_path):
    for read in (checkpoints.load_checkpoint, checkpoints.read_metadata):
        with pytest.raises(FileNotFoundError, match="There is no checkpoint folder"):
            read(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match="is not a complete jflow checkpoint"):
            read(tmp_path)
        with pytest.raises(ValueError, match="python -m jflow.convert from-hf .*golden/tiny"):
            read(GOLDEN / "tiny")


def largest(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "a flipped bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
    ),
}


@pytest.mark.parametrize("name", ["largest", "params/manifest.ocdbt", "params/_METADATA"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named(saved, name, damage):
    file = largest(saved) if name == "largest" else saved / name
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=f"ckpt is damaged or incomplete: .*{file.name}"):
        checkpoints.load_checkpoint(saved)


def test_a_disk_that_fails_for_a_moment_damages_nothing(saved, monkeypatch):
    """Or a run would go back to the checkpoint before, and remove this one as of another course."""

    def failing(file):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="ckpt cannot be read .*5"):
        patch.setattr(checkpoints, "_crc32", failing)
        checkpoints.load_checkpoint(saved)
    assert_same(checkpoints.load_checkpoint(saved)[0], params())


def test_a_deleted_file_is_named(saved):
    file = largest(saved)
    file.unlink()
    with pytest.raises(ValueError, match=f"damaged or incomplete: .*{file.name} is missing"):
        checkpoints.load_checkpoint(saved)
    (saved / checkpoints.CHECKSUMS).unlink()
    message = "not a complete jflow checkpoint: it has no checksums"
    with pytest.raises(FileNotFoundError, match=message):
        checkpoints.load_checkpoint(saved)


@pytest.mark.parametrize("item", ["config", "files"])
def test_missing_metadata_is_named(saved, item):
    shutil.rmtree(saved / item)
    with pytest.raises(ValueError, match="ckpt is damaged or incomplete"):
        checkpoints.read_metadata(saved)


def test_a_state_of_an_earlier_version_is_named(tmp_path, monkeypatch):
    """Its leaves had numbers for names; the parameters beside it are read as ever."""
    numbered = {"000000": jnp.ones(2), "000001": jnp.ones(())}
    checkpoints.save_checkpoint(tmp_path / "old", {"a": {"b": jnp.ones(3)}}, {}, {}, numbered)
    for read in (lambda p: checkpoints.load_state(p, numbered),
                 lambda p: checkpoints.load_entry(p, "params")):  # fmt: skip
        with pytest.raises(ValueError, match="an earlier version of jflow: begin a new run"):
            read(tmp_path / "old")
    assert checkpoints.load_checkpoint(tmp_path / "old")[0]["a"]["b"].shape == (3,)
