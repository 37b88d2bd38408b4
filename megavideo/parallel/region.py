"""Where a layer's work is cut over tensor-parallel ranks: its way in and its way out.

A layer enters a region, computes with its rank's heads, units or vocabulary rows, and leaves with
partial sums. Outside, every rank holds the same slots (`Region`), or its own run of the slots of
each stream (`SlotRegion`: sequence parallelism). Either way a region costs one collective on its
way in or out, forward and backward, for all streams together.

A replicated parameter that takes part in partial sums (a mixture, a bias) enters beside the
streams: its gradient, partial on each rank, then rides in their backward collective, and what the
optimizer is given is whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from megavideo.parallel.collectives import (
    Tensors,
    copy_to_ranks,
    cut_slots,
    gather_slots,
    scatter_sum,
    sum_over_ranks,
)
from megavideo.parallel.mesh import Axis
from megavideo.parallel.random import distinct_randomness


class Region:
    """Outside, every rank holds all slots; with one rank nothing is left to do."""

    def __init__(self, axis: Axis):
        self.axis = axis

    def enter(
        self, streams: Sequence[Tensor], parameters: Sequence[Tensor] = ()
    ) -> tuple[Tensors, Tensors]:
        """All slots of `streams` and the replicated `parameters`, for partial sums."""
        if self.axis.size == 1:
            return tuple(streams), tuple(parameters)
        copies = copy_to_ranks((*streams, *parameters), self.axis)
        return copies[: len(streams)], copies[len(streams) :]

    def leave(self, partial: Sequence[Tensor]) -> Tensors:
        """The streams whose partial sums the ranks bring."""
        return tuple(partial) if self.axis.size == 1 else sum_over_ranks(partial, self.axis)

    def outside(self, stream: Tensor) -> Tensor:
        """What this rank holds outside of a stream [B, slots, h] that all ranks know."""
        return stream

    def applied(self, *parameters: Tensor) -> Tensors:
        """Replicated parameters, for what is computed outside."""
        return parameters

    @contextmanager
    def randomness(self) -> Iterator[None]:
        """Draw in here what falls on slots outside."""
        yield


class SlotRegion(Region):
    """Outside, each rank holds its run of slots of every stream (sequence parallelism)."""

    def enter(
        self, streams: Sequence[Tensor], parameters: Sequence[Tensor] = ()
    ) -> tuple[Tensors, Tensors]:
        return gather_slots(streams, parameters, self.axis)

    def leave(self, partial: Sequence[Tensor]) -> Tensors:
        return scatter_sum(partial, self.axis)

    def outside(self, stream: Tensor) -> Tensor:
        return cut_slots(stream, self.axis)

    def applied(self, *parameters: Tensor) -> Tensors:
        """As `Region.applied`; trained ones cost a small all-reduce of their own."""
        return copy_to_ranks(parameters, self.axis)

    @contextmanager
    def randomness(self) -> Iterator[None]:
        with distinct_randomness(self.axis):
            yield


ALONE = Region(Axis())


def region_of(axis: Axis, sequence_parallel: bool) -> Region:
    """The region over the ranks of `axis`."""
    return SlotRegion(axis) if sequence_parallel else Region(axis)
