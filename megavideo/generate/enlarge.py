"""The last stage: super-resolution of every frame of a finished video."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megavideo.config.schema import ModelConfig
from megavideo.sampling.strategy import Strategy
from megavideo.superres.checkpoint import config_of, load
from megavideo.superres.config import DirectConfig, IterativeConfig
from megavideo.superres.model import DirectSuperResolution, IterativeSuperResolution
from megavideo.superres.upsample import refine, upsample


def direct_config_of(folder: Path, video: ModelConfig) -> DirectConfig:
    """Sizes of the direct super-resolution in `folder`, which enlarges frames of `video`.

    Raises:
        FileNotFoundError: if it holds no super-resolution.
        ValueError: if it is an iterative one, or for other frames.
    """
    config = config_of(folder)
    if not isinstance(config, DirectConfig):
        raise ValueError(
            f"{folder} is an iterative super-resolution, which draws enlarged frames anew: give it "
            "to --refine, and a direct one to --superres"
        )
    if (config.coarse_side, config.image_codes) != (video.side, video.image_codes):
        raise ValueError(
            f"{folder} enlarges frames of {config.coarse_side} x {config.coarse_side} tokens of "
            f"{config.image_codes} codes; the video's have {video.side} x {video.side} of "
            f"{video.image_codes}"
        )
    return config


def iterative_config_of(folder: Path, direct: DirectConfig) -> IterativeConfig:
    """Sizes of the iterative super-resolution in `folder`, which refines what `direct` made.

    Raises: as `direct_config_of`, if it is a direct one, or for other frames.
    """
    config = config_of(folder)
    if not isinstance(config, IterativeConfig):
        raise ValueError(
            f"{folder} is a direct super-resolution, which enlarges frames: give it to --superres, "
            "and an iterative one to --refine"
        )
    if (config.fine_side, config.image_codes) != (direct.fine_side, direct.image_codes):
        raise ValueError(
            f"{folder} refines frames of {config.fine_side} x {config.fine_side} tokens of "
            f"{config.image_codes} codes; --superres makes {direct.fine_side} x "
            f"{direct.fine_side} of {direct.image_codes}"
        )
    return config


class Enlarger:
    """Super-resolution models, and how their tokens are drawn.

    Args:
        superres: folder of the direct model, as `direct_config_of` checks it.
        refinement: folder of the iterative one, as `iterative_config_of` checks it; None for none.
        strategy: how the direct model's tokens are drawn.
    """

    def __init__(
        self,
        superres: Path,
        refinement: Path | None,
        strategy: Strategy,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        direct = load(superres, device, dtype)
        assert isinstance(direct, DirectSuperResolution)
        self.direct = direct
        self.iterative = None
        if refinement is not None:
            iterative = load(refinement, device, dtype)
            assert isinstance(iterative, IterativeSuperResolution)
            self.iterative = iterative
        self.strategy = strategy
        self.seed = seed

    def __call__(self, text: Sequence[int], frames: Tensor, purpose: str) -> Tensor:
        """Fine tokens int64 [F, M] of frames [F, N]; `purpose` names the video's random numbers."""
        fine = upsample(self.direct, text, frames, self.strategy, self.seed, purpose)
        if self.iterative is None:
            return fine
        return refine(self.iterative, text, fine, self.seed, purpose)
