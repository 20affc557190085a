"""The scripts, with commands that fail as told and stand-ins for gcloud and SLURM's programs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from jflow import distributed
from tests.goldens import REPO

UNTIL_DONE = [str(REPO / "scripts" / "until_done.sh"), "bash", "-c"]


def begin(command: str, folder, **settings: str) -> subprocess.Popen:
    environment = os.environ | {"PAUSE": "0"} | settings
    return subprocess.Popen(
        [*UNTIL_DONE, command], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def turns(folder) -> int:
    return len((folder / "turns").read_text().splitlines())


def test_a_command_is_run_until_it_ends_well(tmp_path):
    run = begin("echo >> turns; [ $(wc -l < turns) = 3 ] || exit 7", tmp_path)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0 and turns(tmp_path) == 3
    assert said.count("exit status 7") == 2


def test_a_command_that_only_fails_is_given_up_with_its_status(tmp_path):
    run = begin("echo >> turns; exit 7", tmp_path, TRIES="4")
    run.communicate(timeout=60)
    assert run.returncode == 7 and turns(tmp_path) == 4


def test_failures_far_apart_are_lost_machines(tmp_path):
    """With QUICK=0 none is too quick, and none counts."""
    run = begin("echo >> turns; [ $(wc -l < turns) = 6 ] || exit 7", tmp_path, TRIES="2", QUICK="0")
    run.communicate(timeout=60)
    assert run.returncode == 0 and turns(tmp_path) == 6


def test_waiting_in_vain_for_another_machine_is_no_failure(tmp_path):
    command = f"echo >> turns; [ $(wc -l < turns) = 6 ] || exit {distributed.MISSING}"
    run = begin(command, tmp_path, TRIES="2")
    run.communicate(timeout=60)
    assert run.returncode == 0 and turns(tmp_path) == 6
    run = begin(f"echo >> turns; exit {distributed.MISSING}", tmp_path, WAITS="3")
    run.communicate(timeout=60)
    assert run.returncode == distributed.MISSING and turns(tmp_path) == 9


def test_a_command_that_was_told_to_stop_elsewhere_is_not_run_again(tmp_path):
    run = begin(f"echo >> turns; exit {train.STOPPED}", tmp_path)
    run.communicate(timeout=60)
    assert run.returncode == train.STOPPED and turns(tmp_path) == 1


@pytest.mark.parametrize("status", [0, 7, train.STOPPED])
def test_sigterm_reaches_the_command_and_ends_the_repetition(tmp_path, status):
    """The command is given the time that it takes to save."""
    saving = f"trap 'sleep 0.5; echo saved > saved; exit {status}' TERM"
    run = begin(f"{saving}; echo >> turns; while true; do sleep 0.1; done", tmp_path)
    while not (tmp_path / "turns").exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode == status and turns(tmp_path) == 1
    assert (tmp_path / "saved").exists()


def put(file: Path, script: str) -> None:
    """An executable in bash."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


def wait_for(file: Path, text: str) -> str:
    """What is in the file once it has this text."""
    for _ in range(600):
        if file.exists() and text in file.read_text():
            return file.read_text()
        time.sleep(0.1)
    raise AssertionError(f"{text!r} is not in {file}")


# A train.py that notes its arguments, goes on until it is told to stop, and takes time to save; it
# ends with $STATUS.
TRAIN = """printf '<%s>' "$@" > noted; trap 'sleep 0.3; echo saved >> noted; exit $STATUS' TERM
echo begun >> noted; while true; do sleep 0.1; done"""


def test_tpu_train_passes_arguments_and_stop_lets_it_save(tmp_path):
    """The stand-in for gcloud runs here what it is to run on the hosts."""
    put(
        tmp_path / "bin" / "gcloud",
        f"""printf '%s ' "$@" >> {tmp_path}/calls
        cd {tmp_path}
        while [ $# -gt 0 ]; do [ "$1" != --command ] || eval "$2"; shift; done""",
    )
    put(tmp_path / "jflow" / ".venv" / "bin" / "python", TRAIN)
    put(tmp_path / "jflow" / "scripts" / "until_done.sh", f'exec {UNTIL_DONE[0]} "$@"')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    settings = {"TPU": "slice", "ZONE": "z", "TYPE": "v5litepod-64", "RUNTIME": "r", "PATH": path}
    settings["STATUS"] = str(train.STOPPED)

    def tpu(*arguments):
        command = [str(REPO / "scripts" / "tpu.sh"), *arguments]
        return subprocess.run(command, env=os.environ | settings, timeout=60, check=False)

    assert tpu("create", "--spot").returncode == 0
    calls = (tmp_path / "calls").read_text()
    assert "create slice --zone z --accelerator-type v5litepod-64 --version r --spot" in calls
    assert tpu("train", "--config", "a b.py", "name='x y'").returncode == 0
    noted = wait_for(tmp_path / "jflow" / "noted", "begun")
    assert noted.startswith("<train.py><--config><a b.py><name='x y'>")
    assert "JAX_COMPILATION_CACHE_DIR" not in (tmp_path / "calls").read_text()
    assert tpu("stop").returncode == 0
    wait_for(tmp_path / "jflow" / "noted", "saved")
    assert tpu("fly").returncode == 2
    (tmp_path / "jflow" / "noted").unlink()
    settings["JAX_COMPILATION_CACHE_DIR"] = "/mnt/a b"
    assert tpu("train").returncode == 0
    wait_for(tmp_path / "jflow" / "noted", "begun")
    assert tpu("stop").returncode == 0
    wait_for(tmp_path / "jflow" / "noted", "saved")
    assert r"export JAX_COMPILATION_CACHE_DIR=/mnt/a\ b && " in (tmp_path / "calls").read_text()


def test_tpu_keep_rents_again_what_was_taken_away_and_ends_with_training(tmp_path):
    """Training is taken away once, then ends well. A service that does not answer takes nothing.

    The second slice is not reached at first, and what the first one was sent is still there.
    """
    put(
        tmp_path / "bin" / "gcloud",
        f"""cd {tmp_path}; echo "$4" >> calls
        case $4 in
        describe)
            [ $(grep -c describe calls) != 3 ] || {{ echo "503" >&2; exit 1; }}
            echo "WARNING: an old gcloud" >&2
            cat state 2>/dev/null || {{ echo "NOT_FOUND: no slice" >&2; exit 1; }} ;;
        create) echo READY > state ;;
        delete) rm -r state jflow ;;
        scp) [ $(grep -c scp calls) != 2 ] && cp "$5" jflow.tar.gz ;;
        ssh) while [ $# -gt 0 ]; do [ "$1" != --command ] || eval "$2"; shift; done ;;
        esac""",
    )
    put(tmp_path / "bin" / "python3", "")
    run = f"""echo "$@" >> {tmp_path}/runs
    [ $(wc -l < {tmp_path}/runs) != 1 ] || {{ echo PREEMPTED > {tmp_path}/state; exit 75; }}"""
    put(tmp_path / "run", run)
    put(
        tmp_path / "bin" / "uv",
        f"[ $1 = pip ] || {{ mkdir -p .venv/bin && cp {tmp_path}/run .venv/bin/python; }}",
    )
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    settings = {"TPU": "slice", "ZONE": "z", "TYPE": "t", "RUNTIME": "r", "PATH": path}
    done = subprocess.run(
        [str(REPO / "scripts" / "tpu.sh"), "keep", "--", "--config", "a b.py"],
        env=os.environ | settings | {"PAUSE": "1"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "training ended with 0" in done.stderr and "still rented" in done.stderr
    assert (tmp_path / "runs").read_text() == "train.py --config a b.py\n" * 2
    calls = (tmp_path / "calls").read_text().split()
    # The first delete is of what is not there; both come before the slice is made.
    assert [call for call in calls if call in ("create", "delete")] == ["delete", "create"] * 2
    assert calls.count("scp") == 3


def test_tpu_install_mounts_once_as_documented_and_only_where_all_went_well(tmp_path):
    put(
        tmp_path / "bin" / "gcloud",
        f"""cd {tmp_path}
        case $4 in
        scp) cp "$5" jflow.tar.gz ;;
        ssh) eval "${{@: -1}}" ;;
        esac""",
    )
    put(tmp_path / "bin" / "python3", "")
    put(tmp_path / "bin" / "uv", f"[ ! -e {tmp_path}/broken ]")
    put(tmp_path / "bin" / "mountpoint", f"[ -e {tmp_path}/mounts ]")
    put(tmp_path / "bin" / "sudo", f'[ $1 != mount ] || echo "$@" >> {tmp_path}/mounts')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    text = (REPO / "docs" / "launch.md").read_text()
    mount = re.search(r'^export MOUNT=".*?"$', text, re.MULTILINE | re.DOTALL).group()

    def install() -> int:
        command = ["bash", "-c", f"{mount}\nscripts/tpu.sh install"]
        environment = os.environ | {"TPU": "slice", "ZONE": "z", "PATH": path}
        return subprocess.run(command, cwd=REPO, env=environment, timeout=60).returncode

    (tmp_path / "broken").touch()
    assert install() != 0 and not (tmp_path / "mounts").exists()
    (tmp_path / "broken").unlink()
    assert install() == 0 and install() == 0
    (mounted,) = (tmp_path / "mounts").read_text().splitlines()
    assert mounted == "mount -t nfs 10.0.0.2:/share /mnt/shared"


# As the real one, it does not pass SIGTERM on: it kills its tasks.
SRUN = """echo "$@" > srun
while [[ $1 == --* ]]; do shift; done
"$@" & echo $! > tasks
trap 'kill -KILL $!; exit 137' TERM
wait $!"""


@pytest.mark.parametrize(
    "told, sent, status, requeued",
    [
        ("job", signal.SIGUSR1, train.STOPPED, True),
        ("job", signal.SIGUSR1, 0, False),  # That was the last step.
        ("job", signal.SIGTERM, train.STOPPED, False),
        ("tasks", signal.SIGTERM, train.STOPPED, True),  # Preemption, with time to save.
        ("tasks", signal.SIGTERM, 0, False),
    ],
)
def test_slurm_job_saves_and_queues_itself_again_when_its_time_is_over(
    tmp_path, told, sent, status, requeued
):
    put(tmp_path / "bin" / "srun", SRUN)
    put(tmp_path / "bin" / "scancel", '[ "$*" = "--signal=TERM 17" ] && kill -TERM $(cat tasks)')
    put(tmp_path / "bin" / "scontrol", 'echo "$@" > requeue')
    put(tmp_path / ".venv" / "bin" / "python", TRAIN)
    (tmp_path / "scripts").symlink_to(REPO / "scripts")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    settings = {"PATH": path, "SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "8", "PYTHON": ""}
    job = subprocess.Popen(
        ["bash", str(REPO / "scripts" / "slurm.sbatch"), "--config", "a b.py"],
        cwd=tmp_path,
        env=os.environ | settings | {"STATUS": str(status)},
    )
    noted = wait_for(tmp_path / "noted", "begun")
    assert noted.startswith("<train.py><--config><a b.py>")
    assert "--cpus-per-task=8" in (tmp_path / "srun").read_text().split()
    os.kill(job.pid if told == "job" else int((tmp_path / "tasks").read_text()), sent)
    assert job.wait(timeout=60) == status
    assert "saved" in (tmp_path / "noted").read_text()
    assert (tmp_path / "requeue").exists() == requeued
    assert not requeued or (tmp_path / "requeue").read_text() == "requeue 17\n"


def gpu_checks(folder: Path, python: str, seconds: float) -> subprocess.CompletedProcess:
    """What benchmarks/gpu.sh leaves in folder/out, on the CPU."""
    return subprocess.run(
        ["bash", str(REPO / "benchmarks" / "gpu.sh"), "--device", "cpu"],
        env=os.environ | {"OUT": str(folder / "out"), "PYTHON": python},
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip


def test_gpu_checks_go_on_behind_a_failure_and_leave_one_file(tmp_path):
    """A stand-in for python: the checks fail, the benchmarks write figures."""
    figures = json.dumps({"date": "d", "hardware": "x", "versions": {}, "rows": []})
    put(
        tmp_path / "python",
        f"""case "$*" in
        -c*) ;;  # All can be imported.
        *report.py*) exec {sys.executable} "$@" ;;
        *test_goldens*) echo wrong; exit 3 ;;
        *step.py*) echo '{figures}' >"${{@: -1}}" ;;
        esac""",
    )
    done = gpu_checks(tmp_path, str(tmp_path / "python"), 120)
    assert done.returncode == 1
    (found,) = (tmp_path / "out").glob("*_cpu.json")
    figures = json.loads(found.read_text())
    status = {name: check["status"] for name, check in figures["checks"].items()}
    assert status == {"step": 0, "sampling": 0, "checks": 3}
    assert figures["hardware"] == "x" and figures["step"] == {"rows": []}
    (log,) = (tmp_path / "out").glob("*_checks.txt")
    assert log.read_text() == "wrong\n" and "| checks | failed |" in done.stdout


def test_gpu_checks_say_at_once_what_is_missing(tmp_path):
    put(tmp_path / "python", "echo No module named grain >&2; exit 1")
    done = gpu_checks(tmp_path, str(tmp_path / "python"), 60)
    assert done.returncode == 2 and done.stderr == "No module named grain\n"
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_gpu_checks_run_whole_on_a_cpu(tmp_path):
    done = gpu_checks(tmp_path, sys.executable, 1800)
    assert done.returncode == 0, done.stdout
    (found,) = (tmp_path / "out").glob("*_cpu.json")
    figures = json.loads(found.read_text())
    assert {check["status"] for check in figures["checks"].values()} == {0}
    assert all(row["seconds"] for row in figures["step"]["rows"])
    assert len(figures["sampling"]["tables"]) == 2
    assert figures["sampling"]["image_latency_s"].keys() == {"1"}


SCRIPTS = [*sorted((REPO / "scripts").iterdir()), REPO / "benchmarks" / "gpu.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid(script):
    subprocess.run(["bash", "-n", script], check=True)
