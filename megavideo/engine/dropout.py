"""Dropout as a function of the samples' global position: a resume needs no RNG state."""

import torch
import xxhash

from megavideo.config.schema import RecipeConfig
from megavideo.parallel.mesh import Mesh


def seed_dropout(recipe: RecipeConfig, mesh: Mesh, consumed_samples: int, micro_step: int) -> None:
    """Seed torch for this replica's micro-batch number `micro_step` of a global batch.

    Args:
        consumed_samples: position of the global batch.
    """
    drawn = (micro_step * mesh.dp.size + mesh.dp.rank) * recipe.micro_batch
    position = consumed_samples + drawn
    torch.manual_seed(xxhash.xxh3_64_intdigest(b"dropout %d" % position, recipe.seed))
