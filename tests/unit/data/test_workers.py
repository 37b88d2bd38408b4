"""Work in processes: results in order, errors passed on, for any number of processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavideo.data.workers import map_processes, map_survivors


def halve(number: int) -> float:
    if number == 7:
        raise ValueError("seven")
    return number / 2


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_errors_arrive(workers: int) -> None:
    assert list(map_processes(halve, range(6), workers, chunk=2)) == [0, 0.5, 1, 1.5, 2, 2.5]
    with pytest.raises(ValueError, match="seven"):
        list(map_processes(halve, range(5, 9), workers))


def halve_or_die(number: int) -> float | str:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return halve(number)


def test_an_item_over_which_a_process_dies_does_not_end_the_others() -> None:
    results = map_survivors(halve_or_die, range(6), 2, 2, lambda number: f"{number} kills")
    assert list(results) == [0, 0.5, 1, "3 kills", 2, 2.5]


def test_one_worker_is_this_process() -> None:
    results = map_survivors(lambda number: (number, os.getpid()), range(5), 1, 3, str)
    assert list(results) == [(number, os.getpid()) for number in range(5)]


def test_no_process_outlives_its_parent() -> None:
    code = (
        "import math, time; from megavideo.data.workers import map_processes;"
        "results = map_processes(math.sqrt, [4, 9, 16], 2);"
        "print(next(results), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == b"2.0\n"
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    assert len(children) >= 2
    deadline = time.monotonic() + 20
    while alive := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)
