"""Where values of canonical parameters belong in this rank's memory.

Every parameter is a place, and so is a head's copy of image rows: what fills a model fills places,
and asks for their parts only.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from megavideo.model.build import canonical_parameters
from megavideo.model.head import CopiedRows, Head
from megavideo.parallel.part import Part, part_of
from megavideo.parallel.shard import Shape


@dataclass(frozen=True)
class Place:
    """Memory for a part of the parameter with canonical name `name` and whole shape `shape`.

    `part` is of the whole parameter, or of its first rows.
    """

    name: str
    shape: Shape
    memory: Tensor
    part: Part

    @property
    def slice(self) -> tuple[int, int, int, int | None]:
        """What to read: rows [start, stop) of what `rank` of `size` holds; (rank, size, ...)."""
        if self.part.shape == self.shape:
            return self.part.rank, self.part.size, 0, None
        start = min(self.part.rank * self.part.allocated[0], self.part.shape[0])
        return 0, 1, start, start + self.part.held[0]

    def fill(self, whole: Tensor) -> None:
        """Set it from the whole parameter."""
        self.part.put(self.memory, self.part.of(whole))

    def put(self, values: Tensor) -> None:
        """Set it from what `slice` says."""
        self.part.put(self.memory, values)


def places(container: nn.Module) -> list[Place]:
    """All places of a container's layers."""
    found = [
        Place(name, part_of(parameter).shape, parameter, part_of(parameter))
        for name, parameter in canonical_parameters(container).items()
    ]
    for copy in copies(container).values():
        found.append(Place("embedding.word", copy.table, copy.rows, copy.part))
    return found


def copies(container: nn.Module) -> dict[str, CopiedRows]:
    """Copies of the word table's rows, by a name that is no parameter's."""
    return {
        f"{module.name}.rows": module.rows
        for module in container.modules()
        if isinstance(module, Head) and isinstance(module.rows, CopiedRows)
    }
