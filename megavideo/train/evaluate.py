"""Loss on held-out samples, the same for every number of ranks."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megavideo.data.batch import Batch
from megavideo.engine.world import World


@dataclass(frozen=True)
class HeldOut:
    """Means over the held-out samples.

    Attributes:
        frame_losses: of each frame that carries loss; `loss` is their mean.
        samples: how many there were.
    """

    loss: float
    frame_losses: tuple[float, ...]
    samples: int


def held_out_loss(
    frame_losses: Callable[[Batch], Tensor], batches: Iterable[tuple[Batch, int]], world: World
) -> HeldOut:
    """Mean of `frame_losses` over all ranks' `batches`, each weighted by its samples that count.

    Args:
        batches: this rank's (batch, samples that count); every rank must have as many.
    """
    parts = []
    for batch, count in batches:
        losses = frame_losses(batch).double()
        parts.append(torch.cat([losses, losses.new_ones(1)]) * count)
    *sums, samples = world.total(torch.stack(parts).sum(dim=0)).tolist()
    means = tuple(total / samples for total in sums)
    return HeldOut(sum(means) / len(means), means, int(samples))
