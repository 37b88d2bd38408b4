"""How much there is to do: tokens and FLOPs of one video, before anything is loaded.

Cached decoding computes every slot once, as a forward pass of training does, so a sequence costs
what `megavideo.model.flops` says of the forward pass. With guidance, sequences count twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megavideo.config.schema import Config, RecipeConfig
from megavideo.generate.pipeline import starts
from megavideo.model.flops import sample_work
from megavideo.superres.config import DirectConfig, IterativeConfig
from megavideo.superres.work import direct_flops, iterative_flops


@dataclass(frozen=True)
class Work:
    """Tokens that are drawn, sequences that the model runs, floating-point operations."""

    tokens: int = 0
    sequences: int = 0
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens,
            self.sequences + other.sequences,
            self.flops + other.flops,
        )

    def __mul__(self, times: int) -> "Work":
        return Work(self.tokens * times, self.sequences * times, self.flops * times)


def first_frame_work(config: Config) -> Work:
    """A frame by the text-to-image base of a stage 1 model."""
    recipe = base_recipe(config.recipe)
    return Work(config.model.grid.tokens_per_frame, 1, _forward(config, recipe))


def keyframe_work(config: Config, guided: bool) -> Work:
    """The keyframes after the first."""
    grid, times = config.model.grid, 2 if guided else 1
    tokens = (grid.frames - 1) * grid.tokens_per_frame
    return Work(tokens, times, times * _forward(config, config.recipe))


def interpolation_work(config: Config, frames: int, rounds: int) -> Work:
    """`rounds` doublings of `frames` frames."""
    grid, work = config.model.grid, Work()
    new, given = grid.frames // 2, (grid.frames + 1) // 2
    one = Work(new * grid.tokens_per_frame, 1, _forward(config, config.recipe))
    for _ in range(rounds):
        work += one * len(starts(frames, given))
        frames = 2 * frames - 1
    return work


def superres_flops(stages: Sequence[DirectConfig | IterativeConfig]) -> int:
    """Of enlarging one frame, and refining it if there is a second model."""
    return sum(
        direct_flops(config) if isinstance(config, DirectConfig) else iterative_flops(config)
        for config in stages
    )


def base_recipe(recipe: RecipeConfig) -> RecipeConfig:
    """The recipe of the text-to-image model that a video model holds."""
    return recipe.model_copy(
        update={"stage": "image", "window": 0, "base": None, "start_from": None}
    )


def _forward(config: Config, recipe: RecipeConfig) -> int:
    return sum(part.forward for part in sample_work(config.model, recipe))
