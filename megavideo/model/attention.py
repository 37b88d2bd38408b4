"""Dual-channel attention: a spatial channel (frozen in video training) and a temporal one, mixed.

    text  = dense_spatial(C_text)
    image = a * dense_spatial(C_image) + (1 - a) * dense_temporal(C_temporal), a = sigmoid(mixture)

`a` is one number per hidden unit. (CogVideo, section 3.2; docs/model.md 4.)

Over tensor-parallel ranks every rank has some heads of both channels. The channels' partial sums
are mixed before they are summed over ranks, which mixing commutes with: one collective carries both
channels of images, and text.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.layout.rules import Rule, text_visible
from megavideo.model.layers import Fusing
from megavideo.ops.local_attention import local_attention
from megavideo.parallel.linear import ColumnLinear, RowLinear
from megavideo.parallel.mesh import Axis
from megavideo.parallel.part import new_parameter
from megavideo.parallel.random import distinct_randomness, distinct_seed
from megavideo.parallel.region import Region


class Cache(Protocol):
    """Attention of some image slots over keys kept from earlier calls (generate/cache.py)."""

    def attend(self, image_qkv: Tensor, text_kv: Tensor | None, text_length: Tensor) -> Tensor:
        """What they gather, [B, n, h], as `local_attention` would give."""
        ...


class Channel(nn.Module):
    """The projections of one attention channel, and what image slots see in it (`rule`).

    With a `cache`, which generation sets, only some image slots are computed at a time.
    H is the number of this rank's heads, D their size.
    """

    def __init__(self, hidden: int, heads: int, rule: Rule, dropout: float, axis: Axis):
        super().__init__()
        self.heads = heads // axis.size
        self.rule = rule
        self.dropout = dropout
        self.cache: Cache | None = None
        self.axis = axis
        self.qkv = ColumnLinear(hidden, 3 * hidden, axis, chunks=3)
        self.dense = RowLinear(hidden, hidden, axis)

    def packed(self, states: Tensor) -> Tensor:
        """Queries, keys and values of states [B, slots, h], as [B, slots, 3, H, D]."""
        return self._split_heads(self.qkv(states), 3)

    def text_kv(self, text: Tensor) -> Tensor:
        """Keys and values of text states, [B, T, 2, H, D]; no image channel needs text queries."""
        first = len(self.qkv.bias) // 3
        return self._split_heads(F.linear(text, self.qkv.weight[first:], self.qkv.bias[first:]), 2)

    def image_context(self, image: Tensor, text_kv: Tensor | None, text_length: Tensor) -> Tensor:
        """What image slots gather, [B, V, H*D], before the output projection."""
        packed = self.packed(image)
        if self.cache is not None:
            return self.cache.attend(packed, text_kv, text_length)
        assert text_kv is not None, "only a cache holds text"
        dropout = self.dropout if self.training else 0.0
        seed = distinct_seed(self.axis) if dropout else None
        return local_attention(packed, text_kv, text_length, self.rule, dropout, seed)

    def text_context(self, packed: Tensor, text_length: Tensor) -> Tensor:
        """What text slots gather from real text, [B, T, H*D], given their `packed`."""
        slots = packed.shape[1]
        real = text_visible(torch.arange(slots, device=packed.device), text_length[:, None], slots)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        with distinct_randomness(self.axis) if dropout else nullcontext():
            context = F.scaled_dot_product_attention(q, k, v, real[:, None, None], dropout)
        return context.transpose(1, 2).flatten(2)

    def _split_heads(self, packed: Tensor, parts: int) -> Tensor:
        return packed.unflatten(-1, (parts, self.heads, -1))


class DualAttention(Fusing):
    """Both channels and their mixture; without a temporal rule, the spatial channel alone."""

    def __init__(
        self,
        hidden: int,
        heads: int,
        spatial: Rule,
        temporal: Rule | None,
        dropout: float,
        region: Region,
    ):
        super().__init__()
        self.region = region
        self.spatial = Channel(hidden, heads, spatial, dropout, region.axis)
        if temporal is not None:
            self.temporal = Channel(hidden, heads, temporal, dropout, region.axis)
            self.mixture = new_parameter((hidden,))
        self.is_dual = temporal is not None

    def channels(self) -> Iterator[Channel]:
        """The spatial channel, then the temporal one if there is any."""
        yield self.spatial
        if self.is_dual:
            yield self.temporal

    def forward(self, streams: Sequence[Tensor], text_length: Tensor) -> tuple[Tensor, ...]:
        """Attention of each stream: text [B, T, h], and image slots [B, V, h].

        Text may be left out where every channel has a cache that holds it.
        """
        (*texts, image), (bias, *of_temporal) = self.region.enter(streams, self._replicated())
        packed = [self.spatial.packed(text) for text in texts]
        new = [self.spatial.dense(self.spatial.text_context(p, text_length), bias) for p in packed]
        text_kv = packed[0][:, :, 1:] if packed else None
        context = self.spatial.image_context(image, text_kv, text_length)
        new_image = self.spatial.dense(context, bias)
        if self.is_dual:
            temporal_bias, mixture = of_temporal
            text_kv = self.temporal.text_kv(texts[0]) if texts else None
            context = self.temporal.image_context(image, text_kv, text_length)
            temporal = self.temporal.dense(context, temporal_bias)
            new_image = self.pointwise.mix(new_image, temporal, mixture.sigmoid())
        return self.region.leave([*new, new_image])

    def _replicated(self) -> list[Tensor]:
        """Parameters that every rank holds and that take part in partial sums."""
        if not self.is_dual:
            return [self.spatial.dense.bias]
        return [self.spatial.dense.bias, self.temporal.dense.bias, self.mixture]
