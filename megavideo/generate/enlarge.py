"""The last stage: super-resolution of every frame of a finished video."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavideo.superres.checkpoint import load
from megavideo.superres.model import DirectSuperResolution
from megavideo.superres.upsample import direct_strategy, upsample


class Enlarger:
    """A direct super-resolution model, and how its tokens are drawn.

    Raises:
        FileNotFoundError, ValueError: if `folder` holds no direct super-resolution.
    """

    def __init__(
        self,
        folder: Path,
        labels: Tensor | None,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        model = load(folder, device, dtype)
        if not isinstance(model, DirectSuperResolution):
            raise ValueError(
                f"{folder} is an iterative super-resolution, which refines frames of its own size; "
                "--superres takes a direct one"
            )
        self.model = model
        self.strategy = direct_strategy(labels)
        self.seed = seed

    def __call__(self, text: Sequence[int], frames: Tensor, purpose: str) -> Tensor:
        """Fine tokens int64 [F, M] of frames [F, N]; `purpose` names the video's random numbers."""
        return upsample(self.model, text, frames, self.strategy, self.seed, purpose)
