"""What the super-resolution models are made of: CogView2's layers over two grids.

B batch, T text slots, N coarse tokens, M fine tokens, h hidden, H heads, D head size. Names of
parameters are those of the text-to-video model (docs/model.md); a channel `fine` beside `spatial`
is the direct model's own attention, as `temporal` is in video.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.layout.neighbourhood import NeighbourhoodRule
from megavideo.layout.rules import text_visible
from megavideo.model.embed import text_positions
from megavideo.model.layers import MLP, LayerNorm
from megavideo.ops.neighbourhood_attention import neighbourhood_attention
from megavideo.superres.config import DirectConfig, IterativeConfig, SuperResolutionConfig


class Embedding(nn.Module):
    """Word table, base positions of text and coarse tokens, and positions of fine tokens."""

    def __init__(self, config: SuperResolutionConfig):
        super().__init__()
        self.word = nn.Parameter(torch.empty(config.vocab_size, config.hidden))
        self.position = nn.Parameter(torch.empty(config.position_rows, config.hidden))
        self.fine_position = nn.Parameter(torch.empty(config.fine_tokens, config.hidden))

    def text(self, text: Tensor, text_length: Tensor) -> Tensor:
        """States [B, T, h] of left-padded text."""
        positions = text_positions(text_length, text.shape[1])
        return F.embedding(text, self.word) + F.embedding(positions, self.position)

    def coarse(self, tokens: Tensor, first_position: int) -> Tensor:
        """States [B, N, h] of coarse tokens [B, N]."""
        positions = self.position[first_position : first_position + tokens.shape[1]]
        return F.embedding(tokens, self.word) + positions

    def fine(self, tokens: Tensor) -> Tensor:
        """States [B, M, h] of fine tokens [B, M]."""
        return F.embedding(tokens, self.word) + self.fine_position


class Channel(nn.Module):
    """The projections of one attention."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)

    def packed(self, x: Tensor) -> Tensor:
        """Queries, keys and values of `x` [B, S, h]: [B, S, 3, H, D]."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1))


class Attention(nn.Module):
    """The base's channel, and beside it, in the direct model, that of fine tokens."""

    def __init__(self, hidden: int, heads: int, fine: bool):
        super().__init__()
        self.spatial = Channel(hidden, heads)
        if fine:
            self.fine = Channel(hidden, heads)


def dense_attention(packed: Tensor, visible: Tensor) -> Tensor:
    """[B, S, h] of [B, S, 3, H, D]; `visible` is bool [B, 1, S, S]."""
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """Sandwich LayerNorm and MLP, which every stream of tokens passes with the same weights."""

    def __init__(self, config: SuperResolutionConfig, fine: bool):
        super().__init__()
        self.input_norm = LayerNorm(config.hidden, config.norm_eps)
        self.attention = Attention(config.hidden, config.heads, fine)
        self.attention_norm = LayerNorm(config.hidden, config.norm_eps)
        self.mlp_norm = LayerNorm(config.hidden, config.norm_eps)
        self.mlp = MLP(config.hidden, 0.0)
        self.mlp_output_norm = LayerNorm(config.hidden, config.norm_eps)

    def finish(self, x: Tensor, attention: Tensor) -> Tensor:
        """What follows attention."""
        x = x + self.attention_norm(attention)
        (mlp,) = self.mlp(self.mlp_norm(x))
        return x + self.mlp_output_norm(mlp)


class DirectLayer(Layer):
    """Text and coarse tokens through the base's attention; fine tokens through their own."""

    def __init__(self, config: DirectConfig):
        super().__init__(config, fine=True)
        self.coarse_tokens = config.coarse_tokens
        self.rules = (fine_rule(config), coarse_rule(config))

    def forward(self, coarse: Tensor, fine: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """`coarse` [B, T+N, h] begins with text; `fine` is [B, M, h]; `visible` of coarse_mask."""
        spatial, own = self.attention.spatial, self.attention.fine
        base = spatial.packed(self.input_norm(coarse))
        new_coarse = self.finish(coarse, spatial.dense(dense_attention(base, visible)))
        packed = own.packed(self.input_norm(fine))
        grids = [packed[:, :, 1:], base[:, -self.coarse_tokens :, 1:]]
        no_text = base[:, :0, 1:]
        length = torch.ones(len(fine), dtype=torch.int64, device=fine.device)
        context = neighbourhood_attention(packed[:, :, 0], grids, no_text, length, self.rules)
        return new_coarse, self.finish(fine, own.dense(context))


class IterativeLayer(Layer):
    """Text through attention over text; fine tokens through attention over text and each other."""

    def __init__(self, config: IterativeConfig):
        super().__init__(config, fine=False)
        self.rules = (fine_rule(config),)

    def forward(
        self, text: Tensor, fine: Tensor, text_length: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`text` [B, T, h], `fine` [B, M, h]; `visible` is text_mask's."""
        spatial = self.attention.spatial
        base = spatial.packed(self.input_norm(text))
        new_text = self.finish(text, spatial.dense(dense_attention(base, visible)))
        packed = spatial.packed(self.input_norm(fine))
        context = neighbourhood_attention(
            packed[:, :, 0], [packed[:, :, 1:]], base[:, :, 1:], text_length, self.rules
        )
        return new_text, self.finish(fine, spatial.dense(context))


def fine_rule(config: SuperResolutionConfig) -> NeighbourhoodRule:
    """Fine tokens that a fine token sees: 9 rows and 5 columns as published."""
    side = config.fine_side
    return NeighbourhoodRule(side, side, side, side, 2 * config.window - 1, config.window)


def coarse_rule(config: DirectConfig) -> NeighbourhoodRule:
    """Coarse tokens that a fine token sees: 5 x 5 around the one that it lies in."""
    fine, coarse, window = config.fine_side, config.coarse_side, config.coarse_window
    return NeighbourhoodRule(fine, fine, coarse, coarse, window, window)


def text_mask(text_length: Tensor, slots: int) -> Tensor:
    """bool [B, 1, T, T]: all slots see real text; padding, which nobody sees, sees padding too."""
    real = text_visible(torch.arange(slots, device=text_length.device), text_length[:, None], slots)
    return (real[:, None, :] | ~real[:, :, None])[:, None]


def coarse_mask(text_length: Tensor, slots: int, coarse: int) -> Tensor:
    """bool [B, 1, T+N, T+N]: text as in `text_mask`, coarse tokens see real text and each other."""
    text = text_mask(text_length, slots)
    seen_by_coarse = text[:, :, -1:].expand(-1, -1, coarse, -1)  # the last text slot is real
    blind = text.new_zeros(len(text), 1, slots, coarse)
    seeing = text.new_ones(len(text), 1, coarse, coarse)
    return torch.cat([torch.cat([text, seen_by_coarse], 2), torch.cat([blind, seeing], 2)], 3)
