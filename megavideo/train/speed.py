"""How fast a run is: clips, tokens and useful FLOPs per second, and their part of the peak."""

import resource

import torch

from megavideo.config.schema import Config
from megavideo.model.build import stage_grid
from megavideo.model.flops import training_flops

# Dense bf16/fp16 matrix TFLOP/s from NVIDIA's data sheets, by a part of the device's name; the
# first that fits counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
}


class Speed:
    """Turns samples and seconds into the figures of a metrics row.

    MFU counts what model/flops.py calls useful (no recomputation), over the peak of all devices; it
    is left out where the peak is unknown.
    """

    def __init__(self, config: Config, world_size: int):
        self._tokens = stage_grid(config.model, config.recipe.stage).sequence
        self._flops = training_flops(config.model, config.recipe)
        self._peak = peak_tflops(config) * 1e12 * world_size

    def figures(self, samples: int, seconds: float) -> dict[str, float]:
        """Figures of `samples` (over all ranks) trained in `seconds`."""
        rate = samples / seconds
        figures = {
            "clips_per_s": rate,
            "tokens_per_s": rate * self._tokens,
            "tflops": rate * self._flops / 1e12,
        }
        if self._peak:
            figures["mfu"] = rate * self._flops / self._peak
        return figures


def peak_tflops(config: Config) -> float:
    """run.peak_tflops, or the GPU's data sheet; 0 if unknown (a CPU, another GPU, or fp32)."""
    if config.run.peak_tflops:
        return config.run.peak_tflops
    if not torch.cuda.is_available() or config.recipe.precision == "fp32":
        return 0.0
    device = torch.cuda.get_device_name()
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device), 0.0)


def peak_memory_gib() -> float:
    """Most memory this process has held: allocated by torch on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
