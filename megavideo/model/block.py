"""One transformer layer with sandwich LayerNorm (docs/model.md 3).

x = x + attention_norm(attention(input_norm(x)))
x = x + mlp_output_norm(mlp(mlp_norm(x)))
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megavideo.config.schema import Recompute
from megavideo.layout.rules import Rule
from megavideo.model.attention import DualAttention
from megavideo.model.layers import MLP, LayerNorm, Streams
from megavideo.model.recompute import SPANS, Sublayer
from megavideo.parallel.region import Region


class Block(nn.Module):
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
        streams = [text, image] if text.shape[1] else [image]  # a step of generation has no text
        for sublayer in sublayers:
            if sublayer == "attention":
                streams = self._attention_half(streams, text_length)
            else:
                streams = self._mlp_half(streams)
        return streams[0] if text.shape[1] else text, streams[-1], text_length

    def _attention_half(self, streams: Sequence[Tensor], text_length: Tensor) -> list[Tensor]:
        attention = self.attention([self.input_norm(x) for x in streams], text_length)
        return [x + self.attention_norm(a) for x, a in zip(streams, attention, strict=True)]

    def _mlp_half(self, streams: Sequence[Tensor]) -> list[Tensor]:
        mlp = self.mlp(*(self.mlp_norm(x) for x in streams))
        return [x + self.mlp_output_norm(m) for x, m in zip(streams, mlp, strict=True)]
