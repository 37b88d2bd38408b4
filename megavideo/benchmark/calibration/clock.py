"""What a call takes. On a CPU that is processor time, so that other programs there do not count."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from megavideo.benchmark.harness import time_interleaved

Call = Callable[[], object]
IN_A_ROW = 3  # small calls alone could not be timed


def now(device: torch.device) -> float:
    """Seconds, once all that was begun is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def seconds_of(calls: Mapping[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each call."""
    if device.type == "cuda":
        stretches = {name: [call] * IN_A_ROW for name, call in calls.items()}
        times = time_interleaved(stretches, rounds, warmup=2, device=device)
        return {name: timing.median * 1e-6 for name, timing in times.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            started = time.process_time()
            for _ in range(IN_A_ROW):
                call()
            if number >= 2:
                samples[name].append((time.process_time() - started) / IN_A_ROW)
    return {name: median(values) for name, values in samples.items()}
