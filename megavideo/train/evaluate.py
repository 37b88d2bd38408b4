"""Loss and accuracy on held-out samples, the same for every number of ranks."""

from collections.abc import Callable, Iterable, Sequence
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
    means, samples = held_out_means(frame_losses, batches, world)
    return HeldOut(sum(means) / len(means), means, samples)


def held_out_means(
    measure: Callable[[Batch], Tensor], batches: Iterable[tuple[Batch, int]], world: World
) -> tuple[tuple[float, ...], int]:
    """Means of what `measure` gives of a batch (a vector), as in `held_out_loss`; and samples."""
    parts = []
    for batch, count in batches:
        values = measure(batch).double()
        parts.append(torch.cat([values, values.new_ones(1)]) * count)
    *sums, samples = world.total(torch.stack(parts).sum(dim=0)).tolist()
    return tuple(total / samples for total in sums), int(samples)


def frame_accuracies(logits: Tensor, image: Tensor, frames: Sequence[int]) -> Tensor:
    """Share of each loss frame's tokens whose likeliest code is right, float32 [loss frames].

    Args:
        logits: [B, loss frames, N, codes], the head's; image: int64 [B, F, N].
    """
    right = logits.argmax(-1) == image[:, list(frames)]
    return right.float().mean(dim=(0, 2))
