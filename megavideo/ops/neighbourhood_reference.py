"""Neighbourhood attention in the simplest code that can be right: one dense masked softmax.

B batch, Q queries, K keys of one grid, T text slots, H heads, D head size.
"""

import torch
from torch import Tensor

from megavideo.layout.neighbourhood import NeighbourhoodRule
from megavideo.layout.rules import text_visible
from megavideo.ops.masked_softmax import MaskedSoftmax, compute_dtype, dropout_generator


def forward(
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return (output [B, Q, H*D], log-sum-exp of each query's scores [B, H, Q]).

    Args:
        query: [B, Q, H, D].
        grids: keys and values [B, K, 2, H, D] of each grid; one softmax goes over all of them.
        text_kv: [B, T, 2, H, D]; T may be 0.
        text_length: int64 [B], real tokens at the end of the T slots.
        rules: who sees whom in each grid.
        dropout, seed: as in reference.forward.
    """
    softmax = _dense(query, grids, text_kv, text_length, rules, dropout, seed)
    return softmax.output().transpose(1, 2).flatten(2).to(query.dtype), softmax.lse


def backward(
    grad: Tensor,
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    lse: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the gradients of (query, grids, text_kv), given that of the output, [B, Q, H*D]."""
    softmax = _dense(query, grids, text_kv, text_length, rules, dropout, seed)
    do = grad.unflatten(2, query.shape[2:]).transpose(1, 2).to(lse.dtype)
    dq, dk, dv = softmax.gradients(do, lse)
    grad_kv = torch.stack([dk, dv]).permute(1, 3, 0, 2, 4).to(query.dtype)
    sizes = [text_kv.shape[1], *(kv.shape[1] for kv in grids)]
    grad_text, *grad_grids = (x.contiguous() for x in grad_kv.split(sizes, 1))
    grad_query = dq.transpose(1, 2).to(query.dtype).contiguous()
    return grad_query, grad_grids, grad_text


def _dense(
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
) -> MaskedSoftmax:
    dtype = compute_dtype(query)
    q = query.to(dtype).transpose(1, 2)
    k, v = torch.cat([text_kv, *grids], 1).to(dtype).permute(2, 0, 3, 1, 4)
    visible = _visible(rules, text_kv.shape[1], text_length)
    generator = dropout_generator(dropout, seed, query.device)
    return MaskedSoftmax.of(q, k, v, visible, dropout, generator)


def _visible(rules: tuple[NeighbourhoodRule, ...], text_slots: int, text_length: Tensor) -> Tensor:
    """bool [B, 1, Q, T + all K]."""
    device, batch = text_length.device, len(text_length)
    q = torch.arange(rules[0].queries, device=device)[:, None]
    image = torch.cat([rule(q, torch.arange(rule.keys, device=device)) for rule in rules], 1)
    slots = torch.arange(text_slots, device=device)
    text = text_visible(slots, text_length[:, None], text_slots)[:, None, :]
    return torch.cat([text.expand(-1, len(image), -1), image.expand(batch, -1, -1)], 2)[:, None]
