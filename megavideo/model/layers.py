"""What every block is made of: normalisation, dropout, the MLP, and the tuple between layers.

Two streams run side by side. Text never looks at images, so with a frozen base nothing in the text
stream needs a gradient, and autograd finds that by itself: no weight it meets is trainable.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.ops.pointwise import EAGER, Affine, Pointwise, layer_norm
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
    """LayerNorm with weight and bias."""

    def __init__(self, hidden: int, eps: float, region: Region = ALONE):
        super().__init__()
        self.eps = eps
        self.region = region
        self.weight = new_parameter((hidden,))
        self.bias = new_parameter((hidden,))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.affine(), self.eps)

    def affine(self) -> Affine:
        """Weight and bias, for functions that compute more than this norm at once."""
        weight, bias = self.region.applied(self.weight, self.bias)
        return weight, bias


class Fusing(nn.Module):
    """A part of a layer whose pointwise functions may be compiled.

    In training only: evaluation and generation have other shapes, of which each would be compiled,
    and at a time when nobody expects it.
    """

    compiled: Pointwise | None = None

    @property
    def pointwise(self) -> Pointwise:
        """The functions to call."""
        return self.compiled if self.compiled and self.training else EAGER


def use_pointwise(container: nn.Module, compiled: Pointwise | None) -> None:
    """Let the layers in `container` train with `compiled` functions; None: as they are."""
    for module in container.modules():
        if isinstance(module, Fusing):
            module.compiled = compiled


@contextmanager
def eager(container: nn.Module) -> Iterator[None]:
    """While inside, compiled functions of the layers in `container` are not used."""
    before = {m: m.compiled for m in container.modules() if isinstance(m, Fusing)}
    use_pointwise(container, None)
    try:
        yield
    finally:
        for module, compiled in before.items():
            module.compiled = compiled
