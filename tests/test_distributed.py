"""Runs of several processes, real ones that meet on this machine, and what ends them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sample
import train
from jflow import checkpoints, distributed, sharding
from jflow.training import runs
from jflow.training.optimizer import PRETRAINING
from tests.goldens import REPO
from tests.processes import quadratic
from tests.test_train import command, contents, equal, log  # noqa: F401 (a fixture)

FLAGS = [
    # Processes share busy cores: none of them is to be given up as lost.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
    "--xla_cpu_collective_timeout_seconds=300",
    "--xla_backend_optimization_level=0",
]
MORE = ["trainable=('janusflow/language_model/',)", "data.threads=2"]
# A lost process may also keep the others from ending by an error of their own.
END_SECONDS = distributed.LOST_SECONDS + distributed.FAILED_SECONDS + 30


def free_port(among: Iterable[int] = (0,)) -> int:
    """The first of these that nobody listens at; 0: any."""
    for port in among:
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return free.getsockname()[1]
    raise OSError("All of them are taken.")


class Processes:
    """`count` processes of one run, each with so many devices; program: python's arguments;
    folder: its flag for the run's."""

    def __init__(
        self,
        arguments: list[str],
        run: Path,
        count: int,
        pause: float = 0.0,
        devices: int = 1,
        program: tuple[str, ...] = ("-m", "tests.processes"),
        folder: str = "--run",
    ):
        address = f"127.0.0.1:{free_port()}"
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_FLAGS": " ".join(FLAGS),
            "PAUSE": str(pause),
            "PYTHONUNBUFFERED": "1",
        }
        called = [sys.executable, *program, *arguments, folder, str(run)]
        self.run, self.logs, self.all = run, [], []
        for i in range(count):
            own = ["--coordinator", address, "--processes", str(count), "--process", str(i)]
            self.logs.append(run.with_name(f"{run.name}.{i}.log"))
            with self.logs[-1].open("w") as output:
                process = subprocess.Popen(
                    [*called, *own], cwd=REPO, env=environment, stdout=output, stderr=output
                )
            self.all.append(process)

    def printed(self) -> list[str]:
        return [file.read_text() for file in self.logs]

    def wait_for(self, text: str) -> None:
        """Until process 0 has printed it."""
        while text not in self.logs[0].read_text():
            assert not any(process.poll() for process in self.all), self.printed()
            time.sleep(0.05)

    def finish(self, status: int = 0) -> list[str]:
        codes = [process.wait() for process in self.all]
        assert set(codes) == {status}, (codes, self.printed())
        return self.printed()


@pytest.fixture
def begin(command, tmp_path):  # noqa: F811
    """Starts processes, and kills what is left of them."""
    begun = []

    def start(name: str, count: int, *more: str, **how) -> Processes:
        begun.append(Processes([*command, *MORE, *more], tmp_path / name, count, **how))
        return begun[-1]

    yield start
    for processes in begun:
        for process in processes.all:
            process.kill()
            process.wait()


def alone(command, run: Path, *more: str) -> None:  # noqa: F811
    assert train.main([*command, *MORE, *more, "--run", str(run)]) == 0


def assert_same_course(run: Path, other: Path, step: int) -> None:
    """The same batches, losses within 1e-5, and what they lead to."""
    ours, want = log(run), log(other)
    for name in ("step", "ids", "tokens"):
        assert [line[name] for line in ours] == [line[name] for line in want]
    for name in ("rf", "gradient_norm"):
        np.testing.assert_allclose(
            [line[name] for line in ours], [line[name] for line in want], rtol=1e-5
        )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
    jax.tree.map(close, contents(run, step), contents(other, step))


def test_two_processes_do_what_one_does(begin, command, tmp_path, monkeypatch):  # noqa: F811
    """Told to stop - one of them - both save the same step; one process goes on from there."""
    both, one = tmp_path / "both", tmp_path / "one"
    two = begin("both", 2, "steps=1000", "save_every=1000", pause=0.1)
    two.wait_for("rf=")
    two.all[1].send_signal(signal.SIGTERM)
    first, second = two.finish(train.STOPPED)
    stopped = log(both)[-1]["step"]
    assert stopped < 1000 and runs.steps(both) == [stopped]
    assert f"step {stopped} is saved in" in first and "step" not in second
    assert f"stopped at step {stopped} of 1000: the same command continues." in first
    for text in (first, second):
        (held,) = re.findall(r"holds (\S+) of the state", text)
        assert float(held) < 0.6
    written = {file.name for file in (both / f"{stopped:08d}" / "state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= written

    monkeypatch.setattr(train, "janusflow", quadratic)
    for run in (both, one):
        alone(command, run, f"steps={stopped + 2}")
    assert len({line["ids"] for line in log(one)}) > 2
    assert_same_course(both, one, stopped + 2)


def test_two_processes_rewind_together(begin, command, tmp_path, monkeypatch):  # noqa: F811
    """Batches 4 to 6 are bad, by pictures that one of the processes has: see tests/test_rewind."""
    monkeypatch.setenv("BAD", "16,20,24")
    more = ("steps=8", "rewind_after=3", "save_every=2")
    first, second = begin("both", 2, *more).finish()
    assert "steps 5 to 7 were skipped: back to step 4" in first and "back to" not in second
    assert [line["data_offset"] for line in log(tmp_path / "both")] == [0] * 4 + [4] * 4

    monkeypatch.setattr(train, "janusflow", quadratic)
    alone(command, tmp_path / "one", *more)
    assert_same_course(tmp_path / "both", tmp_path / "one", 8)


@pytest.mark.parametrize("work", ["draw", "ask"])
def test_sample_py_on_two_processes(tiny_ckpt, tmp_path, work):
    """They share the batch, the first one writes; what it writes is what one process does."""
    if work == "draw":
        (tmp_path / "prompts").write_text("a cat\ntwo cats\ntea", encoding="utf-8")
        arguments = ["--prompts", str(tmp_path / "prompts"), "--num", "1", "--steps", "2"]
    else:
        cat = str(REPO / "docs" / "cat.jpg")
        questions = [{"question": "What is this?", "image": cat}, {"question": "Hello!"}]
        (tmp_path / "q").write_text("\n".join(map(json.dumps, questions)), encoding="utf-8")
        arguments = ["--questions", str(tmp_path / "q"), "--max-new-tokens", "8"]
    arguments += ["--ckpt", str(tiny_ckpt)]
    both, one = tmp_path / "both", tmp_path / "one"
    two = Processes(arguments, both, 2, program=("sample.py",), folder="--out")
    first, second = two.finish()
    assert sample.main([*arguments, "--out", str(one)]) == 0
    for text in (f"in {both}", "running"):
        assert text in first and text not in second
    names = [sorted(file.name for file in folder.iterdir()) for folder in (both, one)]
    assert names[0] == names[1] and names[0]
    if work == "ask":
        assert (both / "answers.jsonl").read_text() == (one / "answers.jsonl").read_text()
    else:
        for name in names[0]:
            a, b = (np.asarray(Image.open(folder / name), np.int32) for folder in (both, one))
            assert np.abs(a - b).max() <= 1, name


MEETING = """
import sys
from jflow import distributed
number = int(sys.argv[2])
distributed.start(sys.argv[1], 2, number, seconds=200)
assert distributed.by_first(lambda: [number]) == [0]
try:
    distributed.by_first(lambda: open("nowhere"))
except OSError as error:
    assert "nowhere" in str(error)
with distributed.failing_together():
    if number == 1:
        raise ValueError("Only here.")
    distributed.gather_texts("waits in vain")
"""


def test_a_process_that_fails_alone_ends_all():
    """It says why; the other one does not wait for ever."""
    address = f"127.0.0.1:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING, address, str(number)],
            cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(FLAGS)},
        )
        for number in (0, 1)
    ]  # fmt: skip
    said, _ = both[1].communicate()
    assert both[1].returncode == 2 and said.endswith("Process 1 ends:\nValueError: Only here.\n")
    both[0].communicate(timeout=END_SECONDS)
    assert both[0].returncode != 0


# What a launcher tells each of two processes; JAX makes the port of the job's number.
PORTS = range(61440, 65536)
CLUSTERS = {
    "SLURM": lambda port, number: {
        "SLURM_JOB_ID": str(port - PORTS[0]),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    },
    "Open MPI": lambda port, number: {
        "OMPI_MCA_orte_hnp_uri": f"{(port - PORTS[0]) * len(PORTS)}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(number),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
    },
}
FINDING = """
import jax
from jflow import distributed
distributed.start(seconds=200)
print("found", distributed.gather_texts(f"{jax.process_index()} of {jax.process_count()}"))
"""


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_processes_of_a_cluster_find_each_other(cluster):
    port = free_port(PORTS)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FINDING],
            cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | CLUSTERS[cluster](port, number),
        )
        for number in (0, 1)
    ]  # fmt: skip
    for process in both:
        said, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "found ['0 of 2', '1 of 2']" in said


def test_who_cannot_reach_the_others_says_so_in_time():
    code = f"from jflow import distributed; distributed.start('127.0.0.1:{free_port()}', 2, 1, 3)"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == distributed.MISSING
    assert time.monotonic() - began < 3 + 60  # to import JAX
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("The 2 processes, at 127.0.0.1:")
    assert "did not all connect within 3 seconds" in sentence


def test_flags_that_say_too_little_are_refused_and_one_process_is_alone():
    for given in (("127.0.0.1:1", 2, None), (None, 2, 0), (None, None, 1), ("a:1", 2, 2)):
        with pytest.raises(ValueError, match="give all three or none"):
            distributed.start(*given)
    distributed.start(processes=1)
    distributed.start()
    assert not jax.distributed.is_initialized() and distributed.is_first()
    assert distributed.by_first(lambda: {"a": 1}) == {"a": 1}


@dataclass
class Device:
    process_index: int


class FakeMesh:
    """What `row_share` looks at. owners: [data, fsdp, tensor], the devices' processes."""

    def __init__(self, owners):
        owners = np.array(owners)
        self.shape = dict(zip(("data", "fsdp", "tensor"), owners.shape, strict=True))
        devices = [Device(int(process)) for process in owners.flat]
        self.devices = np.array(devices, object).reshape(owners.shape)


@pytest.mark.parametrize(
    "owners, want",
    [
        ([[[0]]], [(0, 1)]),
        ([[[0], [0]], [[1], [1]]], [(0, 2), (1, 2)]),
        ([[[1], [0], [1], [0]]], [(1, 2), (0, 2)]),
        # `tensor` within processes, across all of them, and across two by two.
        ([[[0, 0], [1, 1]]], [(0, 2), (1, 2)]),
        ([[[0, 0, 1, 1]]], [(0, 1), (0, 1)]),
        ([[[0, 1], [0, 1]]], [(0, 1), (0, 1)]),
        ([[[0, 1], [2, 3]]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_every_process_has_one_share_of_the_rows(monkeypatch, owners, want):
    found = []
    monkeypatch.setattr(jax, "process_count", lambda: len(want))
    for process in range(len(want)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(sharding.row_share(FakeMesh(owners)))
    assert found == want


def test_processes_that_share_a_part_of_their_rows_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="mesh.tensor=2 does not fit the processes"):
        sharding.row_share(FakeMesh([[[0, 0], [0, 1], [1, 1]]]))


@pytest.mark.slow
def test_four_processes_go_on_where_two_stopped(begin, command, tmp_path, monkeypatch):  # noqa: F811
    begin("many", 2, "steps=3").finish()
    begin("many", 4, "steps=6", "mesh.data=2").finish()
    monkeypatch.setattr(train, "janusflow", quadratic)
    alone(command, tmp_path / "one", "steps=6")
    assert_same_course(tmp_path / "many", tmp_path / "one", 6)


@pytest.mark.slow
def test_the_model_learns_on_two_processes_what_it_learns_on_two_devices(begin, tmp_path):
    """train.py as it is: text, pictures and REPA, of all that stage 2 trains, in float32.

    Within 1e-6: sums of two numbers do not depend on their order, and so far nothing differs.
    """
    more = ("steps=4", "save_every=4", f"trainable={PRETRAINING}")
    begin("both", 2, *more, program=("train.py",)).finish()
    begin("one", 1, *more, program=("train.py",), devices=2).finish()
    ours, want = log(tmp_path / "both"), log(tmp_path / "one")
    assert len(ours) == 4 and {"ar", "rf", "repa_cosine", "gradient_norm"} <= set(ours[0])
    for line, same in zip(ours, want, strict=True):
        for name in ("padding", "left_out"):  # Of the rows that process 0 reads.
            del line[name], same[name]
        assert line == pytest.approx(same, rel=1e-6)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # noqa: E731
    jax.tree.map(close, contents(tmp_path / "both", 4), contents(tmp_path / "one", 4))


@pytest.mark.slow
def test_a_mesh_whose_tensor_axis_joins_the_processes(begin, command, tmp_path, monkeypatch):  # noqa: F811
    """Both read all rows."""
    begin("joined", 2, "steps=3", "mesh.tensor=2").finish()
    monkeypatch.setattr(train, "janusflow", quadratic)
    alone(command, tmp_path / "one", "steps=3")
    assert_same_course(tmp_path / "joined", tmp_path / "one", 3)


@pytest.mark.slow
def test_five_kills_of_one_process_lose_nothing(begin, tmp_path):
    """At random moments, three times in the middle of a save: the other process ends in time, and
    the restarts come to what an uninterrupted run comes to, bit for bit."""
    rng, run, in_a_save = np.random.default_rng(0), tmp_path / "killed", 0

    def saving() -> bool:
        return any(not checkpoints.is_checkpoint(folder) for folder in run.glob("[0-9]*"))

    for kill in range(5):
        before = runs.steps(run)
        two = begin("killed", 2, "steps=24", "save_every=1", pause=1.0)
        two.wait_for("rf=")  # The first step is logged, and what was left of a save is removed.
        while runs.steps(run)[:1] == before[:1] if kill % 2 else not saving():
            assert not any(process.poll() for process in two.all), two.printed()
            time.sleep(0.002)
        time.sleep(float(rng.uniform(0, 2 if kill % 2 else 0.05)))
        victim = int(rng.integers(2))
        two.all[victim].kill()
        two.all[1 - victim].wait(timeout=END_SECONDS)
        assert two.all[1 - victim].returncode != 0
        in_a_save += saving()
    assert in_a_save >= 2
    begin("killed", 2, "steps=24", "save_every=100").finish()
    begin("whole", 2, "steps=24", "save_every=100").finish()
    equal(run, tmp_path / "whole", 24)


@pytest.mark.slow
def test_two_processes_draw_and_answer_together(begin, command, tmp_path, monkeypatch):  # noqa: F811
    cat = str(REPO / "docs" / "cat.jpg")
    more = (
        "steps=1", "samples.prompts=('a cat', 'a dog', 'tea')", "samples.steps=1",
        f"samples.questions=(({cat!r}, 'What?'),)", "samples.every=9", "samples.max_new_tokens=3",
    )  # fmt: skip
    begin("both", 2, *more).finish()
    monkeypatch.setattr(train, "janusflow", quadratic)
    alone(command, tmp_path / "one", *more)
    ours, want = tmp_path / "both" / "samples", tmp_path / "one" / "samples"
    assert {file.name for file in ours.iterdir()} == {"00000000.png", "00000000.txt"}
    assert (ours / "00000000.txt").read_text() == (want / "00000000.txt").read_text()
    pictures = [np.asarray(Image.open(f / "00000000.png"), np.int32) for f in (ours, want)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
