"""The part of a parameter that a rank holds: every parameter of the model carries its `Part`."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavideo.parallel.mesh import Axis
from megavideo.parallel.shard import REPLICATED, Shape, Shard, cut, join, part_shape


@dataclass(frozen=True)
class Part:
    """What rank `rank` of `size` holds of a tensor whose whole shape is `shape`."""

    shape: Shape
    shard: Shard = REPLICATED
    rank: int = 0
    size: int = 1

    @property
    def held(self) -> Shape:
        """Shape as in files: real rows only."""
        return part_shape(self.shape, self.shard, self.rank, self.size)

    @property
    def allocated(self) -> Shape:
        """Shape in memory, the same on every rank: rows past the real ones are padding."""
        return part_shape(self.shape, self.shard, 0, self.size)

    def of(self, whole: Tensor) -> Tensor:
        """This part of `whole`; a `whole` with more rows than `shape` gives of its first ones."""
        return cut(whole[: self.shape[0]], self.shard, self.rank, self.size)

    def real(self, allocated: Tensor) -> Tensor:
        """`allocated` without its padding; a view."""
        dim = self.shard.dim
        return allocated if dim is None else allocated.narrow(dim, 0, self.held[dim])

    def put(self, allocated: Tensor, part: Tensor) -> None:
        """Set the real rows of `allocated` to `part`, and padding to zero."""
        with torch.no_grad():
            if self.held != self.allocated:
                allocated.zero_()
            self.real(allocated).copy_(part)


def new_parameter(
    shape: Shape, shard: Shard = REPLICATED, axis: Axis | None = None
) -> nn.Parameter:
    """This rank's part of a parameter with the whole shape `shape`; values are not set.

    Args:
        axis: the ranks that the parameter is cut over; without it all of it is here.

    Raises: ValueError if it cannot be cut over them.
    """
    part = Part(shape, shard) if axis is None else Part(shape, shard, axis.rank, axis.size)
    return with_part(nn.Parameter(torch.empty(part.allocated)), part)


def gather_whole(allocated: Tensor, part: Part, axis: Axis) -> Tensor:
    """The whole tensor, on every rank, from the parts that the ranks of `axis` allocated."""
    if axis.size == 1 or part.shard.dim is None:
        return part.real(allocated)
    everyone = [torch.empty_like(allocated) for _ in range(axis.size)]
    dist.all_gather(everyone, allocated.contiguous(), group=axis.group)
    return join([replace(part, rank=r).real(t) for r, t in enumerate(everyone)], part.shard)


def with_part(parameter: nn.Parameter, part: Part) -> nn.Parameter:
    """Let `parameter` carry `part`."""
    parameter.part = part  # type: ignore[attr-defined]
    return parameter


def part_of(parameter: Tensor) -> Part:
    """The part that the layer that made `parameter` said it is."""
    return parameter.part  # type: ignore[attr-defined]
