"""What every block is made of: normalisation, dropout, the MLP, and the tuple between layers.

Two streams run side by side. Text never looks at images, so with a frozen base nothing in the text
stream needs a gradient, and autograd finds that by itself: no weight it meets is trainable.
"""

from collections.abc import Callable
from functools import lru_cache

import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.log import log
from megavideo.parallel.linear import ColumnLinear, RowLinear
from megavideo.parallel.part import new_parameter
from megavideo.parallel.region import ALONE, Region

# (text [B, T, h], image [B, V, h], text_length int64 [B]); under sequence parallelism each rank has
# its run of the T and of the V slots.
Streams = tuple[Tensor, Tensor, Tensor]


class MLP(nn.Module):
    """W2 gelu(W1 x + b1) + b2 with four times the width in between, tanh form of GELU."""

    def __init__(self, hidden: int, dropout: float, region: Region = ALONE):
        super().__init__()
        self.region = region
        self.up = ColumnLinear(hidden, 4 * hidden, region.axis)
        self.down = RowLinear(4 * hidden, hidden, region.axis)
        self.dropout = Dropout(dropout, region)

    def forward(self, *streams: Tensor) -> list[Tensor]:
        streams, (bias,) = self.region.enter(streams, [self.down.bias])
        partial = [self.down(F.gelu(self.up(x), approximate="tanh"), bias) for x in streams]
        return [self.dropout(x) for x in self.region.leave(partial)]


class Dropout(nn.Module):
    """Dropout of hidden states: each slot has the same zeros on every rank that holds it."""

    def __init__(self, probability: float, region: Region):
        super().__init__()
        self.probability = probability
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        with self.region.randomness():
            return F.dropout(x, self.probability)


class LayerNorm(nn.Module):
    """LayerNorm with weight and bias; NVIDIA apex's fused one on a GPU where apex is there."""

    def __init__(self, hidden: int, eps: float, region: Region = ALONE):
        super().__init__()
        self.eps = eps
        self.region = region
        self.weight = new_parameter((hidden,))
        self.bias = new_parameter((hidden,))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.region.applied(self.weight, self.bias)
        layer_norm = _gpu_layer_norm() if x.is_cuda else _torch_layer_norm
        return layer_norm(x, weight, bias, self.eps)


@lru_cache(maxsize=1)
def _gpu_layer_norm() -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError:  # PyPI's package of that name has no such module either
        log.info("LayerNorm: torch (NVIDIA apex is not installed)")
        return _torch_layer_norm
    log.info("LayerNorm: NVIDIA apex fused_layer_norm_affine")
    return lambda x, weight, bias, eps: fused_layer_norm_affine(
        x, weight, bias, tuple(weight.shape), eps
    )


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)
