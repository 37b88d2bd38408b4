"""Neighbourhood attention in the simplest code that can be right: one dense masked softmax.

B batch, Q queries, K keys of one grid, T text slots, H heads, D head size.
"""

import torch
from torch import Tensor

from megavideo.layout.neighbourhood import NeighbourhoodRule
from megavideo.layout.rules import text_visible


def forward(
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return (output [B, Q, H*D], log-sum-exp of each query's scores [B, H, Q]); differentiable.

    Args:
        query: [B, Q, H, D].
        grids: keys and values [B, K, 2, H, D] of each grid; one softmax goes over all of them.
        text_kv: [B, T, 2, H, D]; T may be 0.
        text_length: int64 [B], real tokens at the end of the T slots.
        rules: who sees whom in each grid.
        dropout, seed: as in reference.forward.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    kv = torch.cat([text_kv, *grids], 1).to(dtype)
    k, v = kv.permute(2, 0, 3, 1, 4)
    q = query.to(dtype).transpose(1, 2)
    visible = _visible(rules, text_kv.shape[1], text_length)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    probability = scores.softmax(-1)
    if dropout:
        generator = torch.Generator(query.device).manual_seed(seed)
        drawn = torch.rand(scores.shape, generator=generator, device=query.device)
        probability = probability * (drawn >= dropout) / (1 - dropout)
    out = (probability @ v).transpose(1, 2).flatten(2)
    return out.to(query.dtype), scores.logsumexp(-1)


def backward(
    grad: Tensor,
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the gradients of (query, grids, text_kv), given that of the output, [B, Q, H*D]."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, *grids, text_kv)]
    with torch.enable_grad():
        out, _ = forward(leaves[0], leaves[1:-1], leaves[-1], text_length, rules, dropout, seed)
    grad_query, *grad_grids, grad_text = torch.autograd.grad(out, leaves, grad)
    return grad_query, grad_grids, grad_text


def _visible(rules: tuple[NeighbourhoodRule, ...], text_slots: int, text_length: Tensor) -> Tensor:
    """bool [B, 1, Q, T + all K]."""
    device, batch = text_length.device, len(text_length)
    q = torch.arange(rules[0].queries, device=device)[:, None]
    image = torch.cat([rule(q, torch.arange(rule.keys, device=device)) for rule in rules], 1)
    slots = torch.arange(text_slots, device=device)
    text = text_visible(slots, text_length[:, None], text_slots)[:, None, :]
    return torch.cat([text.expand(-1, len(image), -1), image.expand(batch, -1, -1)], 2)[:, None]
