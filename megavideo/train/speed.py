"""How fast a run is: clips, tokens and FLOPs per second, and their part of the peak."""

import resource

import torch

from megavideo.config.schema import Config
from megavideo.model.build import stage_grid
from megavideo.model.execution import execution_here
from megavideo.model.flops import executed_flops, naive_flops, training_flops

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

    `tflops` and `mfu` count useful work, `mfu_6n` the 6 N of papers, `hfu` what is executed (see
    model/flops.py). All three are over the peak of all devices, which stands beside them as
    `peak_tflops`; where it is unknown they are left out.
    """

    def __init__(self, config: Config, world_size: int):
        model, recipe = config.model, config.recipe
        self._tokens = stage_grid(model, recipe.stage).sequence
        self._flops = training_flops(model, recipe)
        self._utilisations = {
            "mfu": self._flops,
            "mfu_6n": naive_flops(model, recipe),
            "hfu": executed_flops(model, recipe, execution_here(config)),
        }
        self._peak = peak_tflops(config)
        self._world_size = world_size

    def figures(self, samples: int, seconds: float) -> dict[str, float]:
        """Figures of `samples` (over all ranks) trained in `seconds`."""
        rate = samples / seconds
        figures = {
            "clips_per_s": rate,
            "tokens_per_s": rate * self._tokens,
            "tflops": rate * self._flops / 1e12,
        }
        if self._peak:
            per_flop = rate / (self._peak * 1e12 * self._world_size)
            figures |= {name: flops * per_flop for name, flops in self._utilisations.items()}
            figures["peak_tflops"] = self._peak
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
