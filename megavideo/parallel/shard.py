"""How a parameter is cut over tensor-parallel ranks, and how its parts become whole again.

The layer that makes a parameter says it once (see part.py); resharding, reading and tests follow:

    chunks=1   rank r of P holds the r-th of P equal runs of rows (or columns)
    chunks=3   of a fused [Q; K; V] weight, each chunk is cut so: rank r holds [Q_r; K_r; V_r]
    padded     rows need not divide: a run has ceil(rows / P) rows and the last ranks hold fewer,
               maybe none. The layer that allocates such a part fills it up to equal size; a part
               as defined here, and therefore in every file, has real rows only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """The cut of one parameter; the default is none: every rank holds all of it (replicated)."""

    dim: int | None = None
    chunks: int = 1
    padded: bool = False


REPLICATED = Shard()


@dataclass(frozen=True)
class Piece:
    """Rows (or columns) [start, stop) of the part that `rank` holds."""

    rank: int
    start: int
    stop: int


def slice_plan(length: int, shard: Shard, rank: int, size: int, held: int = 1) -> list[Piece]:
    """What to read, and concatenate along `shard.dim`, for the part of `rank` of `size`.

    Args:
        length: of the whole parameter along `shard.dim`.
        held: number of ranks whose parts there are to read from; 1 is the whole parameter.

    Raises:
        ValueError: if `length` cannot be cut over `size` or `held` ranks.
    """
    wanted = _runs(length, shard, rank, size)
    pieces: list[Piece] = []
    for start, stop in wanted:
        for source in range(held):
            offset = 0
            for low, high in _runs(length, shard, source, held):
                first, last = max(start, low), min(stop, high)
                if first < last:
                    _append(pieces, Piece(source, offset + first - low, offset + last - low))
                offset += high - low
    return pieces


def part_shape(shape: Shape, shard: Shard, rank: int, size: int) -> Shape:
    """Shape of the part of `rank` of a parameter with this whole `shape`.

    Raises: ValueError if it cannot be cut over `size` ranks.
    """
    if shard.dim is None:
        return shape
    rows = sum(stop - start for start, stop in _runs(shape[shard.dim], shard, rank, size))
    return (*shape[: shard.dim], rows, *shape[shard.dim + 1 :])


def whole_shape(parts: Sequence[Shape], shard: Shard) -> Shape:
    """Shape of the parameter whose parts, by rank, have the shapes `parts`.

    Raises: ValueError if no parameter is cut into such parts.
    """
    shape = parts[0]
    if shard.dim is not None and shard.dim < len(shape):
        rows = sum(part[shard.dim] for part in parts if len(part) == len(shape))
        shape = (*shape[: shard.dim], rows, *shape[shard.dim + 1 :])
    if [part_shape(shape, shard, rank, len(parts)) for rank in range(len(parts))] != list(parts):
        raise ValueError(f"parts of shapes {[list(p) for p in parts]} make no whole ({shard})")
    return shape


def cut(whole: Tensor, shard: Shard, rank: int, size: int) -> Tensor:
    """The part of `rank`; a view where the part is one run of rows.

    Raises: ValueError if it cannot be cut over `size` ranks.
    """
    if shard.dim is None:
        return whole
    plan = slice_plan(whole.shape[shard.dim], shard, rank, size)
    return _gather([whole], shard.dim, plan)


def join(parts: Sequence[Tensor], shard: Shard) -> Tensor:
    """The whole parameter from its parts by rank, bit for bit what was cut.

    Raises: ValueError if the parts have shapes that make no whole, or differ though replicated.
    """
    shape = whole_shape([tuple(part.shape) for part in parts], shard)
    if shard.dim is None:
        if not all(_same_bits(part, parts[0]) for part in parts[1:]):
            raise ValueError("ranks hold different values of a replicated tensor")
        return parts[0]
    plan = slice_plan(shape[shard.dim], shard, 0, 1, held=len(parts))
    return _gather(parts, shard.dim, plan)


def _runs(length: int, shard: Shard, rank: int, size: int) -> list[tuple[int, int]]:
    """Where the rows of `rank`'s part lie in the whole, one run a chunk."""
    if length % shard.chunks or (length // shard.chunks % size and not shard.padded):
        pieces = f"{shard.chunks} x {size}" if shard.chunks > 1 else f"{size}"
        raise ValueError(f"a length of {length} cannot be cut into {pieces} equal pieces")
    chunk = length // shard.chunks
    run = -(-chunk // size)
    low, high = min(rank * run, chunk), min((rank + 1) * run, chunk)
    return [(c * chunk + low, c * chunk + high) for c in range(shard.chunks)]


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Add `piece`, as one with the last if it goes on where that ends."""
    if pieces and (pieces[-1].rank, pieces[-1].stop) == (piece.rank, piece.start):
        pieces[-1] = Piece(piece.rank, pieces[-1].start, piece.stop)
    else:
        pieces.append(piece)


def _gather(parts: Sequence[Tensor], dim: int, plan: list[Piece]) -> Tensor:
    runs = [parts[p.rank].narrow(dim, p.start, p.stop - p.start) for p in plan]
    return runs[0] if len(runs) == 1 else torch.cat(runs or [parts[0].narrow(dim, 0, 0)], dim)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
