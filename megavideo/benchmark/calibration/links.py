"""Rates between devices, and to the disk."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

SMALL_BYTES = 4 << 10
LARGE_BYTES = {"cpu": 16 << 20, "cuda": 512 << 20}
DISK_BYTES = {"cpu": 128 << 20, "cuda": 2 << 30}


def measure_link(device: torch.device, rounds: int) -> dict[str, float]:
    """Latency of a message and GB/s of a device, from all-reduces over the whole world.

    A ring of n sends 2 (n - 1) messages one after the other, and 2 (n - 1) / n of the payload. The
    fastest of several counts: anything else that runs there can only slow it down.
    """
    messages = 2 * (dist.get_world_size() - 1)
    small = _all_reduce_seconds(SMALL_BYTES, device, rounds)
    payload = LARGE_BYTES[device.type]
    large = _all_reduce_seconds(payload, device, max(3, rounds // 4))
    moved = payload * messages / dist.get_world_size()
    return {
        "latency_us": small / messages * 1e6,
        "gb_per_s": moved / max(large - small, 1e-9) / 1e9,
    }


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


def _all_reduce_seconds(payload: int, device: torch.device, rounds: int) -> float:
    tensor = torch.zeros(payload // 4, device=device)
    return min(_timed(lambda: dist.all_reduce(tensor), device) for _ in range(rounds + 2))


def _timed(call: Callable[[], object], device: torch.device) -> float:
    dist.barrier()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
