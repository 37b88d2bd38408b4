"""Where this process stands among all: pipeline x data x tensor parallel ranks.

Ranks are numbered as DeepSpeed's `PipeModelDataParallelTopology` does, the tensor axis fastest:

    rank = (pp.rank * dp.size + dp.rank) * tp.size + tp.rank

Neighbours on the tensor axis, which talk most, thus share a node.
"""

from dataclasses import dataclass, field
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, as this process sees it.

    Attributes:
        rank, size: this process's place along the axis.
        ranks: world ranks of the processes along it, by place.
        group: their process group; None on an axis of one, which needs no communication.
    """

    rank: int = 0
    size: int = 1
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = None

    def exchange(self, value: T) -> list[T]:
        """Every process's `value`, by place; all of the axis call it."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.group)
        return values

    @property
    def is_first(self) -> bool:
        """Whether this process is the axis's first."""
        return self.rank == 0


@dataclass(frozen=True)
class Mesh:
    """The three axes through this process."""

    pp: Axis = field(default_factory=Axis)
    dp: Axis = field(default_factory=Axis)
    tp: Axis = field(default_factory=Axis)

    @classmethod
    def single(cls) -> "Mesh":
        """The mesh of one process: every collective is the identity."""
        return cls()

    @classmethod
    def build(cls, pp: int, tp: int) -> "Mesh":
        """Lay the initialised torch.distributed world out as pp x (what is left) x tp.

        Every process must call it: making groups is collective.
        """
        world = dist.get_world_size()
        assert world % (pp * tp) == 0, "check_world refuses this before"
        dp = world // (pp * tp)
        return cls(
            pp=_axis(
                [[(p * dp + d) * tp + t for p in range(pp)] for d in range(dp) for t in range(tp)]
            ),
            dp=_axis(
                [[(p * dp + d) * tp + t for d in range(dp)] for p in range(pp) for t in range(tp)]
            ),
            tp=_axis(
                [[(p * dp + d) * tp + t for t in range(tp)] for p in range(pp) for d in range(dp)]
            ),
        )


SINGLE = Mesh.single()


def _axis(lines: list[list[int]]) -> Axis:
    """Make a group of each line of ranks; the axis is the line through this process."""
    mine = Axis()
    for ranks in lines:
        group = dist.new_group(ranks) if len(ranks) > 1 else None
        if dist.get_rank() in ranks:
            mine = Axis(ranks.index(dist.get_rank()), len(ranks), tuple(ranks), group)
    return mine
