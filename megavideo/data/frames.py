"""Which frames of a clip a sample shows: a function of (seed, stage, epoch, sample) alone.

`count` frames at rate f span (count - 1) / f seconds; in a clip stored at `grid_fps` they are every
(grid_fps / f)-th frame, so a rate is available to a clip only if it divides the clip's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megavideo.config.schema import RecipeConfig, Stage
from megavideo.data.order import FRAMES, below, draw


@dataclass(frozen=True)
class FrameWindow:
    """Frames first, first + stride, ...: `count` of them, at `fps` frames a second."""

    first: int
    stride: int
    count: int
    fps: float

    @property
    def span(self) -> int:
        """Frames of the clip from the first to the last one taken."""
        return (self.count - 1) * self.stride + 1

    @property
    def seconds(self) -> float | None:
        """Seconds from the first to the last frame taken; None for a single image."""
        return (self.count - 1) / self.fps if self.count > 1 else None

    def cut(self, frames: np.ndarray) -> np.ndarray:
        """[n_frames, N] -> [count, N], a view."""
        return frames[self.first : self.first + self.span : self.stride]


@dataclass(frozen=True)
class FrameChooser:
    """Draws the frame window of a sample visit.

    image: one frame. keyframes: the lowest of `rates` that fits. interpolation: any of `rates` that
        fits, each as likely. The first frame is uniform over what fits.
    """

    stage: Stage
    rates: tuple[float, ...]
    count: int
    seed: int

    def windows(self, n_frames: int, grid_fps: float) -> list[FrameWindow]:
        """Those that fit a clip, at its beginning, by rising rate; empty if it is too short."""
        fitting = [window for window in self._windows(grid_fps) if window.span <= n_frames]
        return fitting[:1] if self.stage == "keyframes" else fitting

    def _windows(self, grid_fps: float) -> list[FrameWindow]:
        if self.stage == "image":
            return [FrameWindow(0, 1, 1, grid_fps)]
        strides = ((rate, grid_fps / rate) for rate in self.rates)
        return [
            FrameWindow(0, round(stride), self.count, rate)
            for rate, stride in strides
            if stride > 0.5 and abs(stride - round(stride)) < 1e-6
        ]

    def choose(self, epoch: int, sample: int, n_frames: int, grid_fps: float) -> FrameWindow:
        """The window of this visit; the clip must not be too short."""
        which, start = map(int, draw(self.seed, self._purpose, epoch, sample, 2))
        windows = self.windows(n_frames, grid_fps)
        window = windows[below(len(windows), which)]
        first = below(n_frames - window.span + 1, start)
        return FrameWindow(first, window.stride, window.count, window.fps)

    @property
    def _purpose(self) -> int:
        """Stages draw independently of each other."""
        return FRAMES + ("image", "keyframes", "interpolation").index(self.stage)

    def shortest(self, grid_fps: float) -> int:
        """The number of frames below which a clip is too short for every window.

        Raises: ValueError if no rate divides `grid_fps`.
        """
        windows = self._windows(grid_fps)
        if not windows:
            raise ValueError(
                f"none of recipe.frame_rates={self.rates} divides the clips' {grid_fps} fps"
            )
        return min(window.span for window in windows)


def frame_chooser(recipe: RecipeConfig, count: int) -> FrameChooser:
    """The chooser of a recipe; `count` is the number of frames of a video sample."""
    rates: Sequence[float] = recipe.frame_rates
    if recipe.stage == "keyframes":
        rates = [rate for rate in rates if rate >= recipe.min_fps]
    return FrameChooser(recipe.stage, tuple(rates), count, recipe.seed)
