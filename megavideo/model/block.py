"""One transformer layer with sandwich LayerNorm (docs/model.md 3).

x = x + attention_norm(attention(input_norm(x)))
x = x + mlp_output_norm(mlp(mlp_norm(x)))
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megavideo.layout.rules import Rule
from megavideo.model.attention import DualAttention
from megavideo.model.layers import MLP, Streams, layer_norm


class Block(nn.Module):
    """Layer `index`: text attends to text, then image slots to text and what the rules show them.

    With `recompute`, only the layer's inputs are kept for the backward pass.
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
        recompute: bool,
    ):
        super().__init__()
        self.name = f"layers.{index}"
        self.input_norm = layer_norm(hidden, norm_eps)
        self.attention = DualAttention(hidden, heads, spatial, temporal, attention_dropout)
        self.attention_norm = layer_norm(hidden, norm_eps)
        self.mlp_norm = layer_norm(hidden, norm_eps)
        self.mlp = MLP(hidden, hidden_dropout)
        self.mlp_output_norm = layer_norm(hidden, norm_eps)
        self.recompute = recompute

    def forward(self, streams: Streams) -> Streams:
        text, image, text_length = streams
        new_text, normed_text, text_kv = self._maybe_checkpointed(self._text, text, text_length)
        new_image = self._maybe_checkpointed(self._image, image, normed_text, text_kv, text_length)
        return new_text, new_image, text_length

    def _maybe_checkpointed(self, function, *inputs):  # type: ignore[no-untyped-def]
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    def _text(self, text: Tensor, text_length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.input_norm(text)
        attention, text_kv = self.attention.text(normed, text_length)
        return self._finish(text, attention), normed, text_kv

    def _image(self, image: Tensor, text: Tensor, text_kv: Tensor, text_length: Tensor) -> Tensor:
        attention = self.attention.image(self.input_norm(image), text, text_kv, text_length)
        return self._finish(image, attention)

    def _finish(self, x: Tensor, attention: Tensor) -> Tensor:
        x = x + self.attention_norm(attention)
        return x + self.mlp_output_norm(self.mlp(self.mlp_norm(x)))
