"""Worlds of several processes for tests: no ports, a deadline, the first failure's traceback."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_world(
    function: Callable[..., Any], world_size: int, *arguments: Any, deadline_s: float = 120
) -> None:
    """Call `function(rank, *arguments)` in `world_size` new processes joined over gloo.

    Results go through files: `function` gets a folder among its arguments and writes there.

    Raises:
        AssertionError: with the traceback of the rank that failed first, or if the deadline passed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = mp.get_context("spawn")
        processes = [
            context.Process(
                target=_child, args=(rank, world_size, folder, deadline_s, function, arguments)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, deadline_s)
        _report(folder, processes)


def _child(
    rank: int,
    world_size: int,
    folder: Path,
    deadline_s: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=deadline_s),
    )
    try:
        function(rank, *arguments)
    except BaseException:
        (folder / f"failed-{time.time_ns()}-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # destroying the group would wait for ranks that still run
    dist.destroy_process_group()


def _wait(processes: list[Any], deadline_s: float) -> None:
    """Until all have ended, one has failed, or time is up; what still runs then is killed."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end and any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        if process.is_alive():
            process.join(timeout=1)
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join()


def _report(folder: Path, processes: list[Any]) -> None:
    failures = sorted(folder.glob("failed-*"))
    if failures:
        rank = failures[0].name.rsplit("-", 1)[1]
        raise AssertionError(f"rank {rank} failed first:\n{failures[0].read_text()}")
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise AssertionError(f"the world did not end in time, or died: exit codes {codes}")
