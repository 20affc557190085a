"""Checkpoints written in the background: what arrives, when it counts, what a failure leaves."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jflow import checkpoints
from jflow.checkpoint_writer import Writer, remove_unfinished
from tests.goldens import REPO


def tree(seed: int, size: int = 200_000) -> dict:
    return {"janusflow": {"a": jax.random.normal(jax.random.key(seed), (size,)), "b": jnp.ones(3)}}


@pytest.fixture
def writer():
    made = Writer()
    yield made
    made.close()


@pytest.fixture
def older(tmp_path):
    checkpoints.save_checkpoint(tmp_path / "00000001", tree(1), {}, {})


@pytest.fixture
def held(older, monkeypatch):
    """An event that every save waits for before its checksums, which are its last act."""
    event, write = threading.Event(), checkpoints.write_checksums

    def wait(folder):
        assert event.wait(60)
        write(folder)

    monkeypatch.setattr(checkpoints, "write_checksums", wait)
    yield event
    event.set()


@contextmanager
def files_of_at_most(size: int):
    """The system refuses larger files, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_arrays_may_be_given_away_while_they_are_written(tmp_path, writer, held):
    """Training goes on, into the same buffers, before the checkpoint is whole."""
    step = jax.jit(lambda x: jax.tree.map(lambda a: 2 * a + 1, x), donate_argnums=0)
    now = step(tree(0))
    want = jax.tree.map(np.array, now)
    done = []
    writer.save(
        tmp_path / "00000002", now, {"n": 2}, {"f": "g"}, now, then=lambda: done.append(True)
    )
    for _ in range(5):
        now = step(now)
    jax.block_until_ready(now)
    writer.check()
    assert not done and checkpoints.find_checkpoint(tmp_path).name == "00000001"
    held.set()
    writer.wait()
    assert done and checkpoints.find_checkpoint(tmp_path).name == "00000002"
    got, config, files = checkpoints.load_checkpoint(tmp_path)
    assert config == {"n": 2} and files == {"f": "g"}
    jax.tree.map(np.testing.assert_array_equal, got, want)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load_state(tmp_path, now), want)


def test_it_is_what_a_plain_save_writes(tmp_path, writer):
    checkpoints.save_checkpoint(tmp_path / "plain", tree(3), {"a": 1}, {}, tree(4))
    writer.save(tmp_path / "background", tree(3), {"a": 1}, {}, tree(4))
    writer.wait()

    def names(folder):
        """But for files of data, whose names and number are the storage's affair."""
        found = (f.relative_to(folder).as_posix() for f in folder.rglob("*"))
        return sorted(name for name in found if "/d/" not in name)

    plain, background = tmp_path / "plain", tmp_path / "background"
    assert names(plain) == names(background) and len(names(plain)) > 10
    for read in (checkpoints.load_checkpoint, lambda f: checkpoints.load_state(f, tree(0))):
        jax.tree.map(np.testing.assert_array_equal, read(plain), read(background))


def test_saves_come_one_after_the_other_and_replace_what_is_there(tmp_path, writer):
    for number in range(3):
        writer.save(tmp_path / "00000001", tree(number), {"number": number}, {})
    writer.wait()
    params, config, _ = checkpoints.load_checkpoint(tmp_path)
    assert config == {"number": 2}
    jax.tree.map(np.testing.assert_array_equal, params, tree(2))


def test_no_space_left_is_one_sentence_and_older_checkpoints_stay(tmp_path, older, writer):
    message = r"00000002 cannot be written \(.+\); those before it are whole"
    with files_of_at_most(100_000), pytest.raises(OSError, match=message):
        writer.save(tmp_path / "00000002", tree(2), {}, {})
        writer.wait()
    assert [f.name for f in tmp_path.iterdir()] == ["00000001"]
    jax.tree.map(np.testing.assert_array_equal, checkpoints.load_checkpoint(tmp_path)[0], tree(1))
    writer.save(tmp_path / "00000002", tree(2), {}, {})  # There is room again.
    writer.wait()
    assert checkpoints.find_checkpoint(tmp_path).name == "00000002"


def test_an_error_shows_at_the_next_look(tmp_path, writer, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_checksums", full)
    writer.save(tmp_path / "00000002", tree(2), {}, {})
    writer._thread.submit(lambda: None).result()  # Behind the save: it is through.
    with pytest.raises(OSError, match="No space left on device"):
        writer.check()
    writer.check()  # Once.
    assert not any(tmp_path.iterdir())


def test_a_folder_that_takes_no_files(tmp_path):
    """The program ends with the error, and not minutes later."""
    (tmp_path / "run").write_text("a file")
    program = f"""
import numpy as np
from jflow.checkpoint_writer import Writer
writer = Writer()
writer.save({str(tmp_path / "run" / "00000001")!r}, {{"a": np.ones(3)}}, {{}}, {{}})
writer.wait()
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "OSError: The checkpoint" in done.stderr and "cannot be written" in done.stderr


def test_a_checkpoint_in_use_is_removed_in_the_end(tmp_path, older, monkeypatch):
    """Network file systems keep files that another process has open; saving goes on."""

    def busy(*args, **kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", busy)
        checkpoints.remove_checkpoint(tmp_path / "00000001")
    (left,) = tmp_path.iterdir()
    assert left.name != "00000001"
    remove_unfinished(tmp_path)
    assert not any(tmp_path.iterdir())


def test_want_of_memory_is_no_full_disk(tmp_path, writer, monkeypatch):
    def full(folder):
        raise MemoryError

    monkeypatch.setattr(checkpoints, "write_checksums", full)
    writer.save(tmp_path / "00000002", tree(2), {}, {})
    with pytest.raises(MemoryError):
        writer.wait()
    assert not any(tmp_path.iterdir())


def test_only_unfinished_checkpoints_are_removed(tmp_path, older):
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000002")
    (tmp_path / "00000002" / checkpoints.CHECKSUMS).unlink()
    shutil.copytree(tmp_path / "00000002", tmp_path / "00000003.orbax-checkpoint-tmp")
    # What a kill in the middle of a removal leaves.
    shutil.copytree(tmp_path / "00000001", tmp_path / "00000004.orbax-checkpoint-tmp")
    for name in ("20240101", "3d-scans", "samples"):
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path)
    names = {folder.name for folder in tmp_path.iterdir()}
    assert names == {"00000001", "20240101", "3d-scans", "samples"}
