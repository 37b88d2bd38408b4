"""Neighbourhood attention by torch's scaled_dot_product_attention, one call per strip of rows.

The fast path on a CPU, and on a GPU that the kernels cannot use. Windows are short: of 60 rows a
strip of 4 sees 12, and rows of keys lie side by side, so that each call reads slices.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from megavideo.layout.neighbourhood import NeighbourhoodRule
from megavideo.layout.rules import text_visible

STRIP = 256  # queries in one call, about: fewer see fewer keys in vain, more keep a core busy


@dataclass(frozen=True)
class Strip:
    """Queries of some rows, the keys of each grid that any of them sees, and bool [Q, keys]."""

    queries: slice
    keys: tuple[slice, ...]
    visible: Tensor


def sdpa_neighbourhood_attention(
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
) -> Tensor:
    """Output [B, Q, H*D]; arguments as of `neighbourhood_attention`. Differentiable."""
    text_slots = text_kv.shape[1]
    slots = torch.arange(text_slots, device=query.device)
    real = text_visible(slots, text_length[:, None], text_slots)
    parts = []
    for strip in _strips(rules, str(query.device)):
        q = query[:, strip.queries].transpose(1, 2)
        seen = (kv[:, keys] for kv, keys in zip(grids, strip.keys, strict=True))
        k, v = torch.cat([text_kv, *seen], 1).permute(2, 0, 3, 1, 4)
        text = real[:, None].expand(-1, q.shape[2], -1)
        mask = torch.cat([text, strip.visible.expand(len(real), -1, -1)], 2)
        parts.append(F.scaled_dot_product_attention(q, k, v, mask[:, None]))
    return torch.cat(parts, 2).transpose(1, 2).flatten(2)


@lru_cache(maxsize=16)
def _strips(rules: tuple[NeighbourhoodRule, ...], device: str) -> tuple[Strip, ...]:
    rows = max(1, STRIP // rules[0].columns)
    starts = range(0, rules[0].rows, rows)
    return tuple(_strip(rules, start, min(start + rows, rules[0].rows), device) for start in starts)


def _strip(rules: tuple[NeighbourhoodRule, ...], top: int, bottom: int, device: str) -> Strip:
    columns = rules[0].columns
    queries = slice(top * columns, bottom * columns)
    q = torch.arange(queries.start, queries.stop)[:, None]
    keys, masks = [], []
    for rule in rules:
        visible = rule(q, torch.arange(rule.keys))
        seen = visible.any(0).nonzero()
        keys.append(slice(int(seen[0]), int(seen[-1]) + 1))
        masks.append(visible[:, keys[-1]])
    return Strip(queries, tuple(keys), torch.cat(masks, 1).to(device))
