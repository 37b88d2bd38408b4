"""Local attention by torch's scaled_dot_product_attention, one call per block of visible slots.

The fast path on a CPU where attention has no dropout: torch's fused kernel keeps no scores.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megavideo.layout.render import blocks
from megavideo.layout.rules import Rule, text_visible


def sdpa_local_attention(
    image_qkv: Tensor, text_kv: Tensor, text_length: Tensor, rule: Rule
) -> Tensor:
    """Output [B, V, H*D]; arguments as in reference.forward. Differentiable."""
    text_slots = text_kv.shape[1]
    order, back, masks = _layout(rule, str(image_qkv.device))
    real = text_visible(
        torch.arange(text_slots, device=order.device), text_length[:, None], text_slots
    )
    text_k, text_v = text_kv.permute(2, 0, 3, 1, 4)
    parts = []
    side_by_side = image_qkv[:, order].split([len(mask) for mask in masks], 1)
    for packed, visible in zip(side_by_side, masks, strict=True):
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        n, batch = len(visible), len(real)
        mask = torch.cat([real[:, None].expand(-1, n, -1), visible.expand(batch, -1, -1)], 2)
        parts.append(
            F.scaled_dot_product_attention(
                q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2), mask[:, None]
            )
        )
    return torch.cat(parts, 2)[:, :, back].transpose(1, 2).flatten(2)


@lru_cache(maxsize=64)
def _layout(rule: Rule, device: str) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Slots in block order and the way back, int64 [V], and each block's mask, bool [n, n]."""
    parts = blocks(rule)
    order = torch.cat([torch.from_numpy(block.slots) for block in parts]).to(device)
    masks = tuple(torch.from_numpy(block.visible).to(device) for block in parts)
    return order, order.argsort(), masks
