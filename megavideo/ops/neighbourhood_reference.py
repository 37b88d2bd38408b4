"""Neighbourhood attention in the simplest code that can be right: one dense masked softmax.

B batch, Q queries, K keys of one grid, T text slots, H heads, D head size.
"""

from dataclasses import dataclass

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
    """Return (output [B, Q, H*D], log-sum-exp of each query's scores [B, H, Q]).

    Args:
        query: [B, Q, H, D].
        grids: keys and values [B, K, 2, H, D] of each grid; one softmax goes over all of them.
        text_kv: [B, T, 2, H, D]; T may be 0.
        text_length: int64 [B], real tokens at the end of the T slots.
        rules: who sees whom in each grid.
        dropout, seed: as in reference.forward.
    """
    part = _dense(query, grids, text_kv, text_length, rules, dropout, seed)
    probability = part.scores.softmax(-1) * part.kept
    out = (probability @ part.v).transpose(1, 2).flatten(2)
    return out.to(query.dtype), part.scores.logsumexp(-1)


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
    part = _dense(query, grids, text_kv, text_length, rules, dropout, seed)
    do = grad.unflatten(2, query.shape[2:]).transpose(1, 2).to(lse.dtype)
    probability = (part.scores - lse[..., None]).exp()
    dp = (do @ part.v.transpose(-1, -2)) * part.kept
    ds = probability * (dp - (dp * probability).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
    dk = ds.transpose(-1, -2) @ part.q
    dv = (probability * part.kept).transpose(-1, -2) @ do
    grad_kv = torch.stack([dk, dv]).permute(1, 3, 0, 2, 4).to(query.dtype)
    sizes = [text_kv.shape[1], *(kv.shape[1] for kv in grids)]
    grad_text, *grad_grids = (x.contiguous() for x in grad_kv.split(sizes, 1))
    grad_query = (ds @ part.k).transpose(1, 2).to(query.dtype).contiguous()
    return grad_query, grad_grids, grad_text


@dataclass
class _Dense:
    """q [B,H,Q,D], k and v [B,H,T+all K,D], scores [B,H,Q,T+all K] with -inf if not visible."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    kept: Tensor | float


def _dense(
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
) -> _Dense:
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).transpose(1, 2)
    k, v = torch.cat([text_kv, *grids], 1).to(dtype).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~_visible(rules, text_kv.shape[1], text_length), -torch.inf)
    return _Dense(q, k, v, scores, _kept(scores, dropout, seed))


def _kept(scores: Tensor, dropout: float, seed: int) -> Tensor | float:
    """What probabilities are multiplied by: 0 where dropped, 1 / (1 - dropout) elsewhere."""
    if not dropout:
        return 1.0
    generator = torch.Generator(scores.device).manual_seed(seed)
    drawn = torch.rand(scores.shape, generator=generator, device=scores.device)
    return (drawn >= dropout).to(scores.dtype) / (1 - dropout)


def _visible(rules: tuple[NeighbourhoodRule, ...], text_slots: int, text_length: Tensor) -> Tensor:
    """bool [B, 1, Q, T + all K]."""
    device, batch = text_length.device, len(text_length)
    q = torch.arange(rules[0].queries, device=device)[:, None]
    image = torch.cat([rule(q, torch.arange(rule.keys, device=device)) for rule in rules], 1)
    slots = torch.arange(text_slots, device=device)
    text = text_visible(slots, text_length[:, None], text_slots)[:, None, :]
    return torch.cat([text.expand(-1, len(image), -1), image.expand(batch, -1, -1)], 2)[:, None]
