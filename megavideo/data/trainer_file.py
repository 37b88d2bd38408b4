"""What the small one-process trainers share: their learning rate, and the file they go on from."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavideo.files import atomic_path


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: up over `warmup` of the steps, then a cosine to zero."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return (1 + math.cos(math.pi * done)) / 2


def save_trainer(
    path: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    settings: str,
) -> None:
    """Write everything that `load_trainer` needs as one safetensors file, whole or not at all."""
    tensors = {f"model.{name}": tensor.detach() for name, tensor in weights.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, {"step": str(step), "settings": settings})


def load_trainer(
    path: Path,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    settings: str,
    device: torch.device,
) -> int:
    """Fill `weights` and `optimizer` from a file of `save_trainer`; return its step.

    Raises: ValueError if the file belongs to other settings.
    """
    with safe_open(path, framework="pt", device=str(device)) as file:
        metadata = file.metadata() or {}
        if metadata.get("settings") != settings:
            raise ValueError(
                f"{path} belongs to other settings: {metadata.get('settings')} instead of "
                f"{settings}; remove it to start anew"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"model.{name}"])
    states: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            states.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return int(metadata["step"])
