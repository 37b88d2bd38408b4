"""Dropout as a function of the samples' global position: a resume needs no RNG state."""

import torch
import xxhash

from megavideo.config.schema import RecipeConfig
from megavideo.parallel.mesh import Mesh


def seed_dropout(
    recipe: RecipeConfig, mesh: Mesh, consumed_samples: int, micro_step: int, run: int = 0
) -> None:
    """Seed torch for this replica's micro-batch number `micro_step` of a global batch.

    Args:
        consumed_samples: position of the global batch.
        run: number of the run of layers that is computed next, among all of a pipeline.
    """
    drawn = (micro_step * mesh.dp.size + mesh.dp.rank) * recipe.micro_batch
    position = consumed_samples + drawn
    torch.manual_seed(xxhash.xxh3_64_intdigest(b"dropout %d %d" % (position, run), recipe.seed))
