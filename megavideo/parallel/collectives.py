"""Collectives that autograd sees, for what crosses between tensor-parallel ranks.

A stream is a tensor [B, slots, ...]. Several tensors travel in one collective, side by side in one
buffer; all have one type. Which function undoes which in the backward pass:

    forward                                 backward
    copy_to_ranks     nothing               all-reduce
    sum_over_ranks    all-reduce            nothing
    gather_slots      all-gather            reduce-scatter
    scatter_sum       reduce-scatter        all-gather
    cut_slots         nothing               all-gather

A tensor that needs no gradient takes no part in the backward pass's collective.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megavideo.parallel.mesh import Axis

Tensors = tuple[Tensor, ...]


def copy_to_ranks(tensors: Sequence[Tensor], axis: Axis) -> Tensors:
    """The same tensors, which every rank holds; their gradients, partial on each, are summed."""
    if not any(t.requires_grad for t in tensors):
        return tuple(tensors)
    moving = iter(_Copy.apply(axis, *(t for t in tensors if t.requires_grad)))
    return tuple(next(moving) if t.requires_grad else t for t in tensors)


def sum_over_ranks(tensors: Sequence[Tensor], axis: Axis) -> Tensors:
    """The sums of the ranks' partial tensors, on every rank."""
    return _Sum.apply(axis, *tensors)


def gather_slots(
    streams: Sequence[Tensor], copied: Sequence[Tensor], axis: Axis
) -> tuple[Tensors, Tensors]:
    """Whole streams from the ranks' equal runs of slots, in the order of ranks.

    Args:
        copied: further tensors as in `copy_to_ranks`: they come back as they are, and their
            gradients are summed by the same reduce-scatter that sums the streams'.
    """
    out = _Gather.apply(axis, len(streams), *streams, *copied)
    return out[: len(streams)], out[len(streams) :]


def scatter_sum(streams: Sequence[Tensor], axis: Axis) -> Tensors:
    """This rank's run of slots of the sums of the ranks' partial streams."""
    return _ScatterSum.apply(axis, *streams)


def cut_slots(stream: Tensor, axis: Axis) -> Tensor:
    """This rank's run of slots of a stream that every rank holds; its gradient is whole again."""
    return _Cut.apply(axis, stream)


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: Tensor) -> Tensors:
        ctx.axis = axis
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *_all_reduce(grads, ctx.axis)


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *tensors: Tensor) -> Tensors:
        ctx.set_materialize_grads(False)
        sums = _all_reduce(tensors, axis)
        _only_what_needs_it(ctx, sums)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, *grads


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, num_streams: int, *tensors: Tensor) -> Tensors:
        ctx.axis, ctx.num_streams = axis, num_streams
        out = (*_all_gather(tensors[:num_streams], axis), *tensors[num_streams:])
        ctx.mark_non_differentiable(
            *(t for t, needed in zip(out, ctx.needs_input_grad[2:], strict=True) if not needed)
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[2:]
        wanted = [g if n else None for g, n in zip(grads, needed, strict=True)]
        streams, copied = wanted[: ctx.num_streams], wanted[ctx.num_streams :]
        sums = iter(_reduce_scatter(_present(streams), _present(copied), ctx.axis))
        return None, None, *(next(sums) if n else None for n in needed)


class _ScatterSum(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, *streams: Tensor) -> Tensors:
        ctx.axis = axis
        out = _reduce_scatter(streams, (), axis)
        _only_what_needs_it(ctx, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        needed = ctx.needs_input_grad[1:]
        wanted = [g if n else None for g, n in zip(grads, needed, strict=True)]
        wholes = iter(_all_gather(_present(wanted), ctx.axis))
        return None, *(next(wholes) if n else None for n in needed)


class _Cut(Function):
    @staticmethod
    def forward(ctx: Any, axis: Axis, stream: Tensor) -> Tensor:
        ctx.axis = axis
        return stream.chunk(axis.size, 1)[axis.rank]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *_all_gather([grad], ctx.axis)


def _only_what_needs_it(ctx: Any, out: Tensors) -> None:
    """Without this, all outputs would need a gradient as soon as one input does."""
    needed = ctx.needs_input_grad[1:]
    ctx.mark_non_differentiable(*(t for t, n in zip(out, needed, strict=True) if not n))


def _present(grads: Sequence[Tensor | None]) -> list[Tensor]:
    return [grad for grad in grads if grad is not None]


def _all_reduce(tensors: Sequence[Tensor], axis: Axis) -> Tensors:
    buffer = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(buffer, group=axis.group)
    pieces = buffer.split([t.numel() for t in tensors])
    return tuple(piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True))


def _all_gather(streams: Sequence[Tensor], axis: Axis) -> Tensors:
    mine = torch.cat([t.reshape(-1) for t in streams])
    everyone = mine.new_empty(axis.size * len(mine))
    dist.all_gather_into_tensor(everyone, mine, group=axis.group)
    pieces = everyone.view(axis.size, -1).split([t.numel() for t in streams], 1)
    return tuple(
        piece.unflatten(1, t.shape).transpose(0, 1).flatten(1, 2)
        for piece, t in zip(pieces, streams, strict=True)
    )


def _reduce_scatter(streams: Sequence[Tensor], copied: Sequence[Tensor], axis: Axis) -> Tensors:
    """This rank's slots of the summed `streams`, and the whole sums of `copied`."""
    rows = [t.unflatten(1, (axis.size, -1)).transpose(0, 1) for t in streams]
    everywhere = [t.expand(axis.size, *t.shape) for t in copied]
    given = torch.cat([t.flatten(1) for t in (*rows, *everywhere)], 1)
    mine = given.new_empty(given.shape[1])
    dist.reduce_scatter_tensor(mine, given.view(-1), group=axis.group)
    shapes = [row.shape[1:] for row in (*rows, *everywhere)]
    pieces = mine.split([shape.numel() for shape in shapes])
    return tuple(piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True))
