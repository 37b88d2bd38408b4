"""Timing: contenders interleaved in one process, medians, and the machine's own ceilings."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import quantiles

import torch

# The device idles this long before each timed stretch, so that launches queue up and the time of
# Python and of the launches themselves is not measured. About 3 ms at 1.7 GHz.
HEAD_START_CYCLES = 5_000_000

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Of one call, in microseconds."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: a copy (read and write) in bytes/s, a matrix product in FLOP/s."""

    bytes_per_second: float
    flops_per_second: float


def time_interleaved(
    contenders: Mapping[str, Sequence[Call]], rounds: int, warmup: int, device: torch.device
) -> dict[str, Timing]:
    """Times of each contender; its calls do the same on different inputs, so that caches are cold.

    A round times every contender once, one after the other: what changes with time (clocks,
    temperature) changes for all.
    """
    stretch = _cuda_stretch if device.type == "cuda" else _cpu_stretch
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(warmup + rounds):
        for name, calls in contenders.items():
            microseconds = stretch(calls)
            if round_number >= warmup:
                samples[name].append(microseconds)
    return {name: _timing(values) for name, values in samples.items()}


def _timing(samples: list[float]) -> Timing:
    tenths = quantiles(samples, n=10, method="inclusive")
    return Timing(median=tenths[4], p20=tenths[1], p80=tenths[7])


def _cuda_stretch(calls: Sequence[Call]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / len(calls)


def _cpu_stretch(calls: Sequence[Call]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - start) * 1e6 / len(calls)


def measure_ceilings(device: torch.device, rounds: int) -> Ceilings:
    """A copy of 1 GiB and an 8192^3 product in bfloat16; 64 MiB and 512^3 in float32 on a CPU."""
    on_gpu = device.type == "cuda"
    size = (1 << 30) if on_gpu else (1 << 26)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n, dtype = (8192, torch.bfloat16) if on_gpu else (512, torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    calls = {"copy": [lambda: target.copy_(source)], "product": [lambda: a @ b]}
    times = time_interleaved(calls, rounds, warmup=2, device=device)
    return Ceilings(
        bytes_per_second=2 * size / times["copy"].median * 1e6,
        flops_per_second=2 * n**3 / times["product"].median * 1e6,
    )


def environment(device: torch.device) -> dict[str, str]:
    """What a figure must be read with."""
    on_gpu = device.type == "cuda"
    here = str(Path(__file__).parent)
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "commit": _output("git", "-C", here, "rev-parse", "--short", "HEAD"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _output(*command: str) -> str:
    """First line that a program prints; empty where it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""
