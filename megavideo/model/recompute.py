"""What `parallel.recompute` means: which halves of a block a backward pass computes again.

The one definition that the block, FLOPs, memory and time go by. A block is two sublayers, one after
the other, each with the norm before and the norm behind it: attention and the MLP.
"""

from dataclasses import dataclass
from typing import Literal

from megavideo.config.schema import Recompute

Sublayer = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Span:
    """Sublayers that follow each other in a block.

    Attributes:
        again: only what enters the first is kept; the backward pass computes the rest again.
    """

    sublayers: tuple[Sublayer, ...]
    again: bool


SPANS: dict[Recompute, tuple[Span, ...]] = {
    "none": (Span(("attention", "mlp"), again=False),),
    "mlp": (Span(("attention",), again=False), Span(("mlp",), again=True)),
    "attention": (Span(("attention",), again=True), Span(("mlp",), again=False)),
    "layer": (Span(("attention", "mlp"), again=True),),
}


def computed_again(recompute: Recompute) -> frozenset[Sublayer]:
    """The sublayers that `recompute` computes twice."""
    return frozenset(s for span in SPANS[recompute] if span.again for s in span.sublayers)
