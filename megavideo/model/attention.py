"""Dual-channel attention: a spatial channel (frozen in video training) and a temporal one, mixed.

    text  = dense_spatial(C_text)
    image = a * dense_spatial(C_image) + (1 - a) * dense_temporal(C_temporal), a = sigmoid(mixture)

`a` is one number per hidden unit. (CogVideo, section 3.2; docs/model.md 4.)
"""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.layout.rules import Rule, text_visible
from megavideo.ops.local_attention import local_attention
from megavideo.parallel.shard import Shard, set_shard


class Cache(Protocol):
    """Attention of some image slots over keys kept from earlier calls (generate/cache.py)."""

    def attend(self, image_qkv: Tensor, text_kv: Tensor, text_length: Tensor) -> Tensor:
        """What they gather, [B, n, h], as `local_attention` would give."""
        ...


class Channel(nn.Module):
    """The projections of one attention channel, and what image slots see in it (`rule`).

    With a `cache`, which generation sets, only some image slots are computed at a time.
    """

    def __init__(self, hidden: int, heads: int, rule: Rule, dropout: float):
        super().__init__()
        self.heads = heads
        self.rule = rule
        self.dropout = dropout
        self.cache: Cache | None = None
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.dense = nn.Linear(hidden, hidden)
        set_shard(self.qkv.weight, Shard(dim=0, chunks=3))
        set_shard(self.qkv.bias, Shard(dim=0, chunks=3))
        set_shard(self.dense.weight, Shard(dim=1))

    def split_heads(self, packed: Tensor) -> Tensor:
        """[B, slots, parts*h] -> [B, slots, parts, H, D]."""
        hidden = self.dense.in_features
        return packed.unflatten(-1, (-1, self.heads, hidden // self.heads))

    def text_kv(self, text: Tensor) -> Tensor:
        """Keys and values of text states, [B, T, 2, H, D]; no image channel needs text queries."""
        hidden = self.dense.in_features
        return self.split_heads(F.linear(text, self.qkv.weight[hidden:], self.qkv.bias[hidden:]))

    def image_context(self, image: Tensor, text_kv: Tensor, text_length: Tensor) -> Tensor:
        """What image slots gather, [B, V, h], before the output projection."""
        packed = self.split_heads(self.qkv(image))
        if self.cache is not None:
            return self.cache.attend(packed, text_kv, text_length)
        dropout = self.dropout if self.training else 0.0
        return local_attention(packed, text_kv, text_length, self.rule, dropout)

    def text_context(self, packed: Tensor, text_length: Tensor) -> Tensor:
        """What text slots gather from real text, [B, T, h]; `packed` is their [B, T, 3, H, D]."""
        slots = packed.shape[1]
        real = text_visible(torch.arange(slots, device=packed.device), text_length[:, None], slots)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, real[:, None, None], dropout)
        return context.transpose(1, 2).flatten(2)


class DualAttention(nn.Module):
    """Both channels and their mixture; without a temporal rule, the spatial channel alone."""

    def __init__(
        self, hidden: int, heads: int, spatial: Rule, temporal: Rule | None, dropout: float
    ):
        super().__init__()
        self.spatial = Channel(hidden, heads, spatial, dropout)
        if temporal is not None:
            self.temporal = Channel(hidden, heads, temporal, dropout)
            self.mixture = nn.Parameter(torch.empty(hidden))
        self.is_dual = temporal is not None

    def channels(self) -> Iterator[Channel]:
        """The spatial channel, then the temporal one if there is any."""
        yield self.spatial
        if self.is_dual:
            yield self.temporal

    def text(self, text: Tensor, text_length: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of text, [B, T, h], and the spatial keys and values that images will see."""
        packed = self.spatial.split_heads(self.spatial.qkv(text))
        context = self.spatial.text_context(packed, text_length)
        return self.spatial.dense(context), packed[:, :, 1:]

    def image(self, image: Tensor, text: Tensor, text_kv: Tensor, text_length: Tensor) -> Tensor:
        """Attention of image slots, [B, V, h], given text states and their spatial K and V."""
        context = self.spatial.image_context(image, text_kv, text_length)
        spatial = self.spatial.dense(context)
        if not self.is_dual:
            return spatial
        own_text_kv = self.temporal.text_kv(text)
        temporal = self.temporal.dense(self.temporal.image_context(image, own_text_kv, text_length))
        return torch.lerp(temporal, spatial, self.mixture.sigmoid())
