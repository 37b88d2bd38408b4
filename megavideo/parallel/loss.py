"""Cross-entropy over a vocabulary whose columns are cut over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megavideo.parallel.mesh import Axis


def cross_entropy(logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
    """Cross-entropy of each row, as `F.cross_entropy(..., reduction="none")` of all columns.

    Args:
        logits: [rows, columns], this rank's; equally many on each rank, in the order of ranks.
            Columns that exist only to make it so are -inf: they have no part in the loss.
        labels: int64 [rows], numbers of columns among those of all ranks.

    Returns: [rows], the same on every rank.
    """
    if axis.size == 1:
        return F.cross_entropy(logits, labels, reduction="none")
    return _CrossEntropy.apply(logits, labels, axis)


class _CrossEntropy(Function):
    """loss = log sum exp(x - m) - (x[label] - m), m the row's maximum over all ranks."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
        highest = logits.amax(1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=axis.group)
        shifted = logits - highest[:, None]
        local = labels - axis.rank * logits.shape[1]
        elsewhere = (local < 0) | (local >= logits.shape[1])
        places = local.masked_fill(elsewhere, 0)[:, None]
        target = shifted.gather(1, places)[:, 0].masked_fill(elsewhere, 0)
        probability = shifted.exp_()
        both = torch.stack([probability.sum(1), target])
        dist.all_reduce(both, group=axis.group)
        total, target = both
        probability /= total[:, None]
        ctx.save_for_backward(probability, places, elsewhere)
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        probability, places, elsewhere = ctx.saved_tensors
        hit = torch.ones_like(grad).masked_fill(elsewhere, 0)[:, None]
        return probability.scatter_add(1, places, -hit) * grad[:, None], None, None
