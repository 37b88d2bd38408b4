"""Rates between devices, and to the disk."""

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megavideo.parallel.collectives import gather_slots, scatter_sum, sum_over_ranks
from megavideo.parallel.mesh import Axis

SMALL_BYTES = 4 << 10
LARGE_BYTES = {"cpu": 2 << 20, "cuda": 512 << 20}  # on a CPU, what the demo's layers exchange
DISK_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}
WIDTH = 128  # of a slot


def measure_link(axis: Axis, device: torch.device, rounds: int) -> dict[str, Any]:
    """Latency of a message and GB/s of a device over `axis`: of an all-reduce, and of the two that
    sequence parallelism calls instead.

    Measured as layers call them: what it takes to put streams into one buffer is included.
    """
    calls: dict[str, Callable[[Tensor], object]] = {
        "all_reduce": lambda whole: sum_over_ranks([whole], axis),
        "all_gather": lambda whole: gather_slots([whole.chunk(axis.size, 1)[0]], (), axis),
        "reduce_scatter": lambda whole: scatter_sum([whole], axis),
    }
    rates = {}
    for name, call in calls.items():
        rounds_of_ring = 2 if name == "all_reduce" else 1
        rates[name] = _rate(call, rounds_of_ring * (axis.size - 1), axis.size, device, rounds)
    return rates.pop("all_reduce") | rates


def _rate(
    call: Callable[[Tensor], object], messages: int, size: int, device: torch.device, rounds: int
) -> dict[str, float]:
    """Of `messages` one after the other, each a `size`-th of the payload.

    The fastest of several calls counts: anything else that runs there can only slow them down.
    """
    small, large = (_stream(n, size, device) for n in (SMALL_BYTES, LARGE_BYTES[device.type]))
    latency = min(_timed(partial(call, small), device) for _ in range(rounds + 2))
    taken = min(_timed(partial(call, large), device) for _ in range(max(3, rounds // 2)))
    moved = large.nbytes * messages / size
    return {
        "latency_us": latency / messages * 1e6,
        "gb_per_s": moved / max(taken - latency, 1e-9) / 1e9,
    }


def _stream(payload: int, size: int, device: torch.device) -> Tensor:
    """[2, slots, WIDTH] of about `payload` bytes, whose slots can be cut over `size` ranks."""
    slots = max(1, payload // (2 * WIDTH * 4 * size)) * size
    return torch.zeros(2, slots, WIDTH, device=device)


def measure_disk(folder: Path, device: torch.device) -> float:
    """GB/s of writing a file of several hundred megabytes and syncing it."""
    block, count = os.urandom(16 << 20), DISK_BYTES[device.type] >> 24
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return count * len(block) / (time.perf_counter() - started) / 1e9


def _timed(call: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
