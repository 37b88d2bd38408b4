"""Start a world of processes on this machine: no ports, a deadline, the first failure's traceback.

For verification and tests; training is started by torchrun.
"""

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

from megavideo.engine.errors import RunFailed

# What every child would import for seconds; a fork server imports it once for all of them.
PRELOADED = ["megavideo.engine.build"]


def run_world(
    function: Callable[..., Any], world_size: int, *arguments: Any, deadline_s: float = 120
) -> None:
    """Call `function(rank, *arguments)` in `world_size` new processes joined into one world.

    Each has one GPU (NCCL) where this machine has GPUs, else one CPU thread (gloo). Results go
    through files: `function` gets a folder among its arguments and writes there.

    Raises:
        ValueError: if this machine has GPUs, but too few.
        RunFailed: with the traceback of the rank that failed first, or if the deadline passed.
    """
    if 0 < torch.cuda.device_count() < world_size:
        raise ValueError(
            f"a world of {world_size} needs as many GPUs, this machine has "
            f"{torch.cuda.device_count()}; set CUDA_VISIBLE_DEVICES= (empty) to use CPU cores"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = _context()
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


def _context() -> Any:
    if torch.cuda.is_available():
        return mp.get_context("spawn")  # looking for a GPU made forking unsafe
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


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
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
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
        raise RunFailed(f"rank {rank} failed first:\n{failures[0].read_text()}")
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RunFailed(f"the world did not end in time, or died: exit codes {codes}")
