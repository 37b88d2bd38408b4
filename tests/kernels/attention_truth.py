"""What interval attention must give: one dense softmax, with the kernels' own dropout."""

import numpy as np
import torch
from torch import Tensor

from megavideo.layout.intervals import TILE, intervals
from megavideo.layout.render import dense_mask
from megavideo.layout.rules import Rule, text_visible
from tests.kernels.dropout_bits import kept_bits


def true_attention(
    image_qkv: Tensor, text_kv: Tensor, text_length: Tensor, rule: Rule, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Output [B, V, H*D] and lse [B, H, V]; differentiable. Inputs as in ops/reference.py."""
    text_slots = text_kv.shape[1]
    q, _, _ = image_qkv.permute(2, 0, 3, 1, 4)
    k, v = torch.cat([text_kv, image_qkv[:, :, 1:]], 1).permute(2, 0, 3, 1, 4)
    real = text_visible(torch.arange(text_slots), text_length[:, None], text_slots)
    image = torch.from_numpy(dense_mask(rule))
    mask = torch.cat([real[:, None].expand(-1, len(image), -1), image.expand(len(real), -1, -1)], 2)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    probability = scores.softmax(-1)
    if dropout:
        probability = probability * _kept(probability, rule, text_slots, dropout, seed)
    return (probability @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1)


def _kept(probability: Tensor, rule: Rule, text_slots: int, dropout: float, seed: int) -> Tensor:
    """What probabilities [B, H, V, T+V] are multiplied by; kernels draw by place, not by slot."""
    batch, heads, _, _ = probability.shape
    threshold = round(256 * dropout)
    slots = intervals(rule).slots
    places = np.empty(slots.max() + 1, dtype=np.int64)
    places[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
    first_place = -(-text_slots // TILE) * TILE
    columns = np.concatenate([np.arange(text_slots), first_place + places])
    bits = kept_bits(seed, np.arange(batch * heads), len(slots), columns.max() + 1, threshold)
    kept = bits[:, places][:, :, columns].reshape(probability.shape)
    return torch.from_numpy(kept) * (256 / (256 - threshold))
