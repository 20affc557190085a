"""Processes that make data: the order of what they make, their errors, their end."""

import itertools
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest

from jflow.data.workers import ahead, in_processes, pool
from tests.goldens import REPO

PROGRAM = """
import os, time
from jflow.data.workers import pool
if __name__ == "__main__":
    processes = pool(2)
    print({processes.submit(os.getpid).result() for _ in range(20)}, flush=True)
    time.sleep(60)
"""


def square(number: int) -> int:
    if number == 4_999:
        raise ValueError("broken")
    return number**2


def test_many_items_are_made_by_several_processes_in_order():
    assert list(in_processes(square, range(4_500))) == [n**2 for n in range(4_500)]
    assert list(in_processes(square, range(3))) == [0, 1, 4]
    with pytest.raises(ValueError, match="broken"):
        list(in_processes(square, range(5_000)))


def test_each_begins_as_told():
    with pool(1, os.putenv, "NOBODY", "known") as processes:
        assert processes.submit(subprocess.check_output, ["printenv", "NOBODY"]).result()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_job_ends_none_of_them(number):
    with pool(2) as processes:
        made = {processes.submit(os.getpid).result() for _ in range(20)}
        for pid in (*made, forkserver._forkserver._forkserver_pid):
            os.kill(pid, number)
        time.sleep(0.2)  # That of one process would be found out.
        assert processes.submit(os.getpid).result(timeout=30) in made


def die_at(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_death_among_them_is_one_sentence():
    """Found by what is submitted later: from Python 3.12 on that waited for the others' end."""
    with pool(3) as processes, pytest.raises(OSError, match="has died, mostly for want of memory"):
        for _ in ahead(lambda job: processes.submit(die_at, job), itertools.count(), 2):
            time.sleep(0.05)


def test_they_end_with_a_program_that_is_killed(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    run = subprocess.Popen(
        [sys.executable, file], stdout=subprocess.PIPE, text=True, env=environment
    )
    made = eval(run.stdout.readline())
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while made and time.monotonic() < deadline:
        made = {pid for pid in made if os.path.exists(f"/proc/{pid}")}
        time.sleep(0.1)
    assert not made
