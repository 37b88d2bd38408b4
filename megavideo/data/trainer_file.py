"""What the small one-process trainers share: their learning rate, their loop, their checkpoints."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megavideo.files import atomic_path
from megavideo.log import log, progress


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: up over `warmup` of the steps, then a cosine to zero."""
    rising = max(1, round(steps * warmup))
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return (1 + math.cos(math.pi * done)) / 2


class Trainer(Protocol):
    """A model in training; `train` calls `after_step(loss, more to show)` after each step."""

    step: int
    training: Any

    def train(self, data: Any, /, after_step: Callable[..., None]) -> None: ...
    def save(self, path: Path) -> None: ...
    def resume(self, path: Path) -> None: ...


def train_with_checkpoints(trainer: Trainer, data: Any, path: Path, save_every: int) -> None:
    """Train to the end with a bar, from the checkpoint at `path` if it exists, saving it often."""
    if path.exists():
        trainer.resume(path)
        log.info("resumed %s at step %d", path, trainer.step)
    steps = trainer.training.steps
    with progress("training", total=steps) as advance:
        advance(trainer.step)

        def after_step(loss: float, *more: object) -> None:
            advance(note=", ".join([f"loss {loss:.3f}", *map(str, more)]))
            if trainer.step % save_every == 0 and trainer.step < steps:
                trainer.save(path)

        trainer.train(data, after_step)


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
