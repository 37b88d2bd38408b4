"""One transformer layer with sandwich LayerNorm (docs/model.md 3).

x = x + attention_norm(attention(input_norm(x)))
x = x + mlp_output_norm(mlp(mlp_norm(x)))
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megavideo.config.schema import Recompute
from megavideo.layout.rules import Rule
from megavideo.model.attention import DualAttention
from megavideo.model.layers import MLP, Fusing, LayerNorm, Streams
from megavideo.model.recompute import SPANS, Sublayer
from megavideo.parallel.region import Region


class Block(Fusing):
    """Layer `index`: text attends to text, image slots to text and to what the rules show them.

    Both streams are computed together, so that over tensor-parallel ranks attention and MLP cost
    one collective each, forward and backward.

    Of the halves that `recompute` names, only the inputs are kept for the backward pass. Text is
    then computed again too, although it needs no gradient: 3 % of a layer's forward work.
    """

    def __init__(
        self,
        index: int,
        hidden: int,
        heads: int,
        spatial: Rule,
        temporal: Rule | None,
        hidden_dropout: float,
        attention_dropout: float,
        norm_eps: float,
        recompute: Recompute,
        region: Region,
    ):
        super().__init__()
        self.name = f"layers.{index}"
        self.input_norm = LayerNorm(hidden, norm_eps, region)
        self.attention = DualAttention(hidden, heads, spatial, temporal, attention_dropout, region)
        self.attention_norm = LayerNorm(hidden, norm_eps, region)
        self.mlp_norm = LayerNorm(hidden, norm_eps, region)
        self.mlp = MLP(hidden, hidden_dropout, region)
        self.mlp_output_norm = LayerNorm(hidden, norm_eps, region)
        self.norm_eps = norm_eps
        self.spans = SPANS[recompute]

    def forward(self, streams: Streams) -> Streams:
        for span in self.spans:
            if span.again and torch.is_grad_enabled():
                streams = checkpoint(self._through, span.sublayers, *streams, use_reentrant=False)
            else:
                streams = self._through(span.sublayers, *streams)
        return streams

    def _through(
        self, sublayers: Sequence[Sublayer], text: Tensor, image: Tensor, text_length: Tensor
    ) -> Streams:
        streams, normed = self._taken(text, image), None
        if "attention" in sublayers:
            attention = self._attend(streams, text_length)
            if "mlp" in sublayers:
                streams, normed = self._added_and_normed(streams, attention)
            else:
                streams = self._added(streams, attention, self.attention_norm)
        if "mlp" in sublayers:
            mlp = self.mlp(*(normed or [self.mlp_norm(x) for x in streams]))
            streams = self._added(streams, mlp, self.mlp_output_norm)
        return streams[0] if len(streams) > 1 else text, streams[-1], text_length

    def _taken(self, text: Tensor, image: Tensor) -> list[Tensor]:
        """The streams that pass this layer."""
        return [text, image] if text.shape[1] else [image]  # a step of generation has no text

    def _attend(self, streams: Sequence[Tensor], text_length: Tensor) -> Sequence[Tensor]:
        return self.attention([self.input_norm(x) for x in streams], text_length)

    def _added(
        self, streams: Sequence[Tensor], branches: Sequence[Tensor], norm: LayerNorm
    ) -> list[Tensor]:
        """Each stream with what its branch, normed, brings."""
        affine, pairs = norm.affine(), zip(streams, branches, strict=True)
        add = self.pointwise.residual_norm
        return [add(x, branch, affine, self.norm_eps) for x, branch in pairs]

    def _added_and_normed(
        self, streams: Sequence[Tensor], attention: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The streams with what attention brings, and these normed for the MLP."""
        norms = self.attention_norm.affine(), self.mlp_norm.affine()
        add = self.pointwise.residual_norms
        pairs = zip(streams, attention, strict=True)
        both = [add(x, branch, *norms, self.norm_eps) for x, branch in pairs]
        return [x for x, _ in both], [normed for _, normed in both]
