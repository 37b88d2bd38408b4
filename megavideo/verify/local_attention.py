"""Checks of the published Image-Local-Attention kernels: scores, weighted sums, gradients.

The kernels speak of offsets in a window, our rule of pairs of query and key; `_pairs` translates.
Scores are those of the operator's plain reference.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from megavideo.layout.neighbourhood import NeighbourhoodRule
from megavideo.ops.masked_softmax import MaskedSoftmax
from megavideo.verify.compare import Row, compare

PARAMETERS = "params_kH_kW_causal"
OUTSIDE = -10000.0  # the published score of an offset where there is no key


def local_attention_rows(case: str, values: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Rows of every problem in a file of arrays named `problem/array`."""
    for problem in sorted({key.split("/")[0] for key in values if key.endswith(PARAMETERS)}):
        arrays = {key.split("/")[1]: values[key] for key in values if key.startswith(f"{problem}/")}
        for name, ours in _compute(arrays).items():
            reference = arrays[name]
            if name == "similar":
                # Beside scores of -10000 an error in the others would be relatively nothing.
                missing = ours == OUTSIDE, reference == OUTSIDE
                yield compare(case, f"{problem}/similar outside", *missing, "exact")
                ours, reference = (np.where(x == OUTSIDE, 0, x) for x in (ours, reference))
            yield compare(case, f"{problem}/{name}", ours, reference, "float64")


def _compute(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows, columns, causal = arrays[PARAMETERS].tolist()
    (height, width), (key_height, key_width) = arrays["q"].shape[2:], arrays["k"].shape[2:]
    rule = NeighbourhoodRule(height, width, key_height, key_width, rows, columns, bool(causal))
    q, k, v, weight, grad_similar, grad_out = (
        torch.from_numpy(arrays[name]).double().requires_grad_()
        for name in ("q", "k", "v", "weight", "grad_similar", "grad_out")
    )
    similar = _similar(q, k, rule, weight.shape[-1])
    weighting = _weighting(v, weight, rule)
    grad_q, grad_k = torch.autograd.grad(similar, (q, k), grad_similar)
    grad_v, grad_weight = torch.autograd.grad(weighting, (v, weight), grad_out)
    results = {
        "similar": similar,
        "similar_grad_q": grad_q,
        "similar_grad_k": grad_k,
        "weighting": weighting,
        "weighting_grad_v": grad_v,
        "weighting_grad_weight": grad_weight,
    }
    return {name: tensor.detach().numpy() for name, tensor in results.items()}


def _similar(q: Tensor, k: Tensor, rule: NeighbourhoodRule, offsets: int) -> Tensor:
    """Scores [B, H, W, offsets] of q [B, C, H, W] and k [B or fewer, C, h, w], without scaling."""
    q_B1QC = q.flatten(2).transpose(1, 2)[:, None]
    k_B1KC = _for_each(k, len(q)).flatten(2).transpose(1, 2)[:, None]
    slots = torch.arange(rule.queries)[:, None], torch.arange(rule.keys)
    softmax = MaskedSoftmax.of(q_B1QC, k_B1KC, k_B1KC, rule(*slots)[None, None], 0.0, None)
    query, key, offset = _pairs(rule)
    scores = q.new_full((len(q), rule.queries, offsets), OUTSIDE)
    scores = scores.index_put(
        (torch.arange(len(q))[:, None], query, offset),
        softmax.scores[:, 0, query, key] * q.shape[1] ** 0.5,
    )
    return scores.unflatten(1, q.shape[2:])


def _weighting(v: Tensor, weight: Tensor, rule: NeighbourhoodRule) -> Tensor:
    """Sums [B, C, H, W] of v [B or fewer, C, h, w], weighted by weight [B, H, W, offsets]."""
    query, key, offset = _pairs(rule)
    dense = weight.new_zeros(len(weight), rule.queries, rule.keys)
    dense = dense.index_put(
        (torch.arange(len(weight))[:, None], query, key), weight.flatten(1, 2)[:, query, offset]
    )
    sums = dense @ _for_each(v, len(weight)).flatten(2).transpose(1, 2)
    return sums.transpose(1, 2).unflatten(2, weight.shape[1:3])


def _for_each(keys: Tensor, batch: int) -> Tensor:
    """Queries of several samples may share one sample's keys."""
    return keys.repeat_interleave(batch // len(keys), 0)


def _pairs(rule: NeighbourhoodRule) -> tuple[Tensor, Tensor, Tensor]:
    """Every visible (query, key), and its offset in the window, counted in raster order."""
    slots = torch.arange(rule.queries)[:, None], torch.arange(rule.keys)
    query, key = torch.nonzero(rule(*slots), as_tuple=True)
    down = key // rule.key_columns - query // rule.columns // (rule.rows // rule.key_rows)
    right = key % rule.key_columns - query % rule.columns // (rule.columns // rule.key_columns)
    row, column = down + rule.window_rows // 2, right + rule.window_columns // 2
    return query, key, row * rule.window_columns + column
