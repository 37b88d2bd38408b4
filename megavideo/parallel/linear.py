"""Linear layers and tables of which every tensor-parallel rank holds a part."""

import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.parallel.collectives import copy_to_ranks, sum_over_ranks
from megavideo.parallel.mesh import Axis
from megavideo.parallel.part import new_parameter
from megavideo.parallel.shard import Shard, cut


class ColumnLinear(nn.Module):
    """y = x W^T + b, W cut along its output: each rank computes its own units.

    Args:
        chunks: how many matrices are fused in W, each of which is cut (3 for Q, K, V).
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis, chunks: int = 1):
        super().__init__()
        shard = Shard(dim=0, chunks=chunks)
        self.weight = new_parameter((out_features, in_features), shard, axis)
        self.bias = new_parameter((out_features,), shard, axis)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """y = x W^T + b, W cut along its input: each rank's result is a partial sum.

    The first rank adds the bias, so the sum has it once and no rank passes over its result again.
    Every rank holds the bias; `forward` takes it because its gradient, which only the first rank
    has, must be summed on the way in (see region.py).
    """

    def __init__(self, in_features: int, out_features: int, axis: Axis):
        super().__init__()
        self.weight = new_parameter((out_features, in_features), Shard(dim=1), axis)
        self.bias = new_parameter((out_features,))
        self._adds_bias = axis.is_first

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.weight, bias if self._adds_bias else None)


def embed(ids: Tensor, table: Tensor, axis: Axis) -> Tensor:
    """Rows of a table that is cut over its rows: this rank's, and zeros in place of the others'.

    Args:
        ids: int64, of the whole table.
        table: [rows of every rank, h], this rank's part.
    """
    if axis.size == 1:
        return F.embedding(ids, table)
    local = ids - axis.rank * len(table)
    elsewhere = (local < 0) | (local >= len(table))
    rows = F.embedding(local.masked_fill(elsewhere, 0), table)
    return rows.masked_fill(elsewhere[..., None], 0)


def first_rows(table: Tensor, count: int, axis: Axis) -> Tensor:
    """This rank's even part of the first `count` rows of a table that is cut over its rows.

    Those rows lie on the first ranks only. Each is sent to all, forward, and its gradient comes
    back to the rank that holds it.
    """
    if axis.size == 1:
        return table[:count]
    low = min(axis.rank * len(table), count)
    high = min(low + len(table), count)
    placed = F.pad(table[: high - low], (0, 0, low, count - high))
    (whole,) = copy_to_ranks(sum_over_ranks([placed], axis), axis)
    return cut(whole, Shard(dim=0, padded=True), axis.rank, axis.size)
