"""Feature networks from a file that the user names.

A TorchScript archive is a program: it runs with the rights of whoever loads it, so load one only
from where you would run a program from. Weights of C3D, as safetensors or as torch saves them, are
data and are safe to load.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megavideo.metrics.c3d import c3d_from

RANGES = {"-1..1": (-1.0, 1.0), "0..1": (0.0, 1.0), "0..255": (0.0, 255.0)}


@dataclass(frozen=True)
class Network:
    """What a network takes, and the function: clips float [B, 3, T, H, W] -> [B, D].

    pixels: a key of RANGES.
    """

    function: Callable[[Tensor], Tensor]
    pixels: str
    device: torch.device

    @torch.no_grad()
    def outputs(self, clips: Iterator[np.ndarray], batch: int) -> Tensor:
        """float64 [n, D] of clips uint8 [T, H, W, 3] that all have the same shape."""
        parts = []
        while group := list(islice(clips, batch)):
            parts.append(self._output(group))
        return torch.cat(parts)

    def _output(self, clips: list[np.ndarray]) -> Tensor:
        low, high = RANGES[self.pixels]
        frames = torch.from_numpy(np.stack(clips)).to(self.device)
        result = self.function(frames.permute(0, 4, 1, 2, 3) / 255 * (high - low) + low)
        if not isinstance(result, Tensor) or result.dim() != 2 or len(result) != len(clips):
            made = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"the feature network made {made} of {len(clips)} clips; it must make one row of "
                "each (with TorchScript, --argument may ask it for features)"
            )
        return result.double().cpu()


def load_function(
    path: Path, arguments: Mapping[str, bool], logits: bool, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """The network in `path`: a TorchScript program, or weights of C3D.

    Args:
        arguments: given to a TorchScript program beside the clips.
        logits: take C3D's logits rather than its features.
    Raises:
        FileNotFoundError: if there is no such file, with what to do.
        ValueError: if it is neither, or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no feature network {path}: these weights are not shipped; docs/metrics.md says which "
            "networks are customary and where they come from"
        )
    if is_torchscript(path):
        try:
            program = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"TorchScript program {path}: {_first_line(error)}") from None
        return lambda clips: program(clips, **arguments)
    try:
        network = c3d_from(_weights(path)).to(device).eval()
    except ValueError as error:
        raise ValueError(
            f"{path} is neither a TorchScript program nor weights of C3D: {error}"
        ) from None
    return network if logits else network.features


def is_torchscript(path: Path) -> bool:
    """Whether the file is a TorchScript archive: a zip with a folder of code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(_first_line(error)) from None
    if not isinstance(content, dict):
        raise ValueError("it holds no named tensors")
    return content.get("state_dict", content)


def _first_line(error: Exception) -> str:
    """What an error says, without the stack of C++ that torch appends; its kind if nothing."""
    return next(iter(str(error).splitlines()), repr(error))
