"""Gradient clipping where DeepSpeed steps the bare torch optimizer (ZeRO 0)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavideo.parallel.mesh import Mesh


def clip_gradients(parameters: Iterable[nn.Parameter], clip: float, mesh: Mesh) -> Tensor:
    """Clip reduced gradients by their norm over all pipeline stages, which is returned.

    A norm that is not finite drops the gradients instead: an optimizer without them leaves weights
    and state alone. All ranks of a replica must call it.

    Args:
        clip: largest norm; 0 does not clip.
    """
    trained = [p for p in parameters if p.grad is not None]
    norm = _global_norm([p.grad for p in trained], mesh)
    if not norm.isfinite():
        for parameter in trained:
            parameter.grad = None
    elif clip:
        torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
    return norm


def _global_norm(gradients: list[Tensor | None], mesh: Mesh) -> Tensor:
    norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
    if mesh.pp.group is None:
        return norm
    square = norm.square()
    dist.all_reduce(square, group=mesh.pp.group)
    return square.sqrt()
