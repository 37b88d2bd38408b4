"""Gradient clipping where DeepSpeed steps the bare torch optimizer (ZeRO 0)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavideo.parallel.mesh import Mesh
from megavideo.parallel.part import part_of


def clip_gradients(parameters: Iterable[nn.Parameter], clip: float, mesh: Mesh) -> Tensor:
    """Clip reduced gradients by their norm over all ranks of a replica, which is returned.

    A norm that is not finite drops the gradients instead: an optimizer without them leaves weights
    and state alone. All ranks of a replica must call it.

    Args:
        clip: largest norm; 0 does not clip.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = _global_norm(trained, mesh)
    if not norm.isfinite():
        for parameter in trained:
            parameter.grad = None
    elif clip:
        torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
    return norm


def _global_norm(trained: list[nn.Parameter], mesh: Mesh) -> Tensor:
    """Parameters that tensor-parallel ranks hold alike count on the first of them only."""
    counted = [p for p in trained if mesh.tp.is_first or part_of(p).shard.dim is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in counted if p.grad is not None])
    for axis in (mesh.tp, mesh.pp):
        if axis.size > 1:
            square = norm.square()
            dist.all_reduce(square, group=axis.group)
            norm = square.sqrt()
    return norm
