"""Which layers lie on which pipeline rank, computed once for all layouts that agree on it."""

from functools import lru_cache

from megavideo.config.schema import (
    Config,
    ModelConfig,
    ParallelConfig,
    RecipeConfig,
    Recompute,
    Stage,
)
from megavideo.model.partition import partition, runs_of_rank

Runs = tuple[range, ...]


def runs_of(config: Config) -> Runs:
    """The layers of each run, of all pipeline ranks."""
    parallel, recipe = config.parallel, config.recipe
    cut = (parallel.pp, parallel.virtual_stages, parallel.partition, parallel.recompute)
    return _runs(config.model, recipe.stage, recipe.window, *cut)


def stages_of(config: Config) -> list[list[int]]:
    """Numbers of the layers that each pipeline rank holds."""
    runs, pp = runs_of(config), config.parallel.pp
    return [[layer for run in runs_of_rank(runs, rank, pp) for layer in run] for rank in range(pp)]


@lru_cache(maxsize=1024)
def _runs(
    model: ModelConfig,
    stage: Stage,
    window: int,
    pp: int,
    virtual_stages: int,
    given: tuple[int, ...] | None,
    recompute: Recompute,
) -> Runs:
    recipe = RecipeConfig(stage=stage, window=window, steps=1)
    parallel = ParallelConfig(
        pp=pp, virtual_stages=virtual_stages, partition=given, recompute=recompute
    )
    return tuple(partition(model, recipe, parallel))
