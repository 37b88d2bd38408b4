"""A parameter cut over ranks is joined bit for bit, and each rank reads its own rows only."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megavideo.parallel.shard import (
    REPLICATED,
    Shard,
    cut,
    join,
    part_shape,
    slice_plan,
    whole_shape,
)

SIZES = st.sampled_from([1, 2, 3, 4, 8])
SHARDS = [Shard(0), Shard(1), Shard(0, chunks=3), Shard(0, padded=True), REPLICATED]


def whole(shard: Shard, size: int, rows: int) -> torch.Tensor:
    """Numbered elements, in a shape that can be cut."""
    length = rows if shard.padded else rows * shard.chunks * size
    shape = (2, length) if shard.dim == 1 else (length, 2)
    return torch.arange(2 * length).reshape(shape)


@given(st.sampled_from(SHARDS), SIZES, SIZES, st.integers(1, 9))
def test_any_cut_becomes_whole_and_is_cut_again_from_parts(
    shard: Shard, held: int, size: int, rows: int
) -> None:
    tensor = whole(shard, held * size, rows)
    parts = [cut(tensor, shard, rank, held) for rank in range(held)]
    assert torch.equal(join(parts, shard), tensor)
    shapes = [tuple(part.shape) for part in parts]
    assert shapes == [part_shape(tuple(tensor.shape), shard, r, held) for r in range(held)]
    assert whole_shape(shapes, shard) == tuple(tensor.shape)
    if shard.dim is None:
        return
    for rank in range(size):
        plan = slice_plan(tensor.shape[shard.dim], shard, rank, size, held)
        runs = [parts[p.rank].narrow(shard.dim, p.start, p.stop - p.start) for p in plan]
        mine = cut(tensor, shard, rank, size)
        read = torch.cat(runs, shard.dim) if runs else mine[:0]
        assert torch.equal(read, mine)
        assert sum(p.stop - p.start for p in plan) == mine.shape[shard.dim], "nothing else is read"


def test_a_fused_qkv_keeps_its_parts_apart() -> None:
    qkv = torch.arange(12)  # Q is 0-3, K 4-7, V 8-11
    assert cut(qkv, Shard(0, chunks=3), 1, 2).tolist() == [2, 3, 6, 7, 10, 11]


def test_rows_that_do_not_divide_leave_the_last_ranks_fewer() -> None:
    rows = torch.arange(10)[:, None]
    assert [len(cut(rows, Shard(0, padded=True), rank, 4)) for rank in range(4)] == [3, 3, 3, 1]
    assert [len(cut(rows, Shard(0, padded=True), rank, 8)) for rank in range(8)] == [2] * 5 + [
        0
    ] * 3


def test_a_whole_is_read_in_one_piece() -> None:
    assert len(slice_plan(12, Shard(0, chunks=3), 0, 1)) == 1


def test_what_cannot_be_cut_or_joined_is_refused() -> None:
    with pytest.raises(ValueError, match="12 cannot be cut into 3 x 8 equal pieces"):
        cut(torch.zeros(12), Shard(0, chunks=3), 0, 8)
    with pytest.raises(ValueError, match="make no whole"):
        join([torch.zeros(4, 2), torch.zeros(4, 3)], Shard(0))
    with pytest.raises(ValueError, match="cannot be cut into 2 equal pieces"):
        join([torch.zeros(4, 2), torch.zeros(5, 2)], Shard(0))
    with pytest.raises(ValueError, match="different values"):
        join([torch.tensor([0.0]), torch.tensor([-0.0])], REPLICATED)
