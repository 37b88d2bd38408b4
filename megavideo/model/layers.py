"""What every block is made of: normalisation, the MLP, and the tuple that travels between layers.

Two streams run side by side. Text never looks at images, so with a frozen base nothing in the text
stream needs a gradient, and autograd finds that by itself: no weight it meets is trainable.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.log import log
from megavideo.parallel.shard import Shard, set_shard

# (text [B, T, h], image [B, V, h], text_length int64 [B])
Streams = tuple[Tensor, Tensor, Tensor]


class MLP(nn.Module):
    """W2 gelu(W1 x + b1) + b2 with four times the width in between, tanh form of GELU."""

    def __init__(self, hidden: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(hidden, 4 * hidden)
        self.down = nn.Linear(4 * hidden, hidden)
        set_shard(self.up.weight, Shard(dim=0))
        set_shard(self.up.bias, Shard(dim=0))
        set_shard(self.down.weight, Shard(dim=1))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))


def layer_norm(hidden: int, eps: float) -> nn.Module:
    """LayerNorm with weight and bias; NVIDIA apex's fused one where a GPU and apex are there."""
    return _norm_class()(hidden, eps=eps)


@lru_cache(maxsize=1)
def _norm_class() -> type[nn.Module]:
    if not torch.cuda.is_available():
        return nn.LayerNorm
    try:
        from apex.normalization import FusedLayerNorm
    except ImportError:  # PyPI's package of that name has no such module either
        log.info("LayerNorm: torch (NVIDIA apex is not installed)")
        return nn.LayerNorm
    log.info("LayerNorm: NVIDIA apex FusedLayerNorm")
    return FusedLayerNorm


def as_copy(parameter: nn.Parameter) -> nn.Parameter:
    """Mark `parameter` as a copy of another's values, which has no canonical name of its own."""
    parameter.is_copy = True  # type: ignore[attr-defined]
    return parameter


def is_copy(parameter: nn.Parameter) -> bool:
    """Whether `as_copy` marked it."""
    return getattr(parameter, "is_copy", False)
