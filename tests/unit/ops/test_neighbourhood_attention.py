"""Neighbourhood attention is the published similarity, softmax and weighting."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megavideo.layout.neighbourhood import NeighbourhoodRule, encode_rules
from megavideo.ops import neighbourhood_sdpa
from megavideo.ops.neighbourhood_attention import neighbourhood_attention
from megavideo.ops.neighbourhood_sdpa import sdpa_neighbourhood_attention as strips

# Arrays of the published local-attention kernels' arithmetic, computed independently in float64.
VECTORS = Path(__file__).parents[2] / "reference" / "vectors" / "pub_ila.npz"
OWN = NeighbourhoodRule(6, 6, 6, 6, 5, 3)
COARSE = NeighbourhoodRule(6, 6, 2, 3, 3, 1)
NO_TEXT = torch.ones(2, dtype=torch.int64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(2, *shape, 2, 8, generator=generator, dtype=torch.float64).requires_grad_()


def windows(rule: NeighbourhoodRule) -> Tensor:
    """int64 [Q, offsets]: keys that the published kernels visit, -1 where there is none."""
    count = rule.window_rows * rule.window_columns
    offset = torch.arange(count // 2 + 1 if rule.causal else count)
    q = torch.arange(rule.queries)[:, None]
    row = q // rule.columns // (rule.rows // rule.key_rows)
    column = q % rule.columns // (rule.columns // rule.key_columns)
    row = row + offset // rule.window_columns - rule.window_rows // 2
    column = column + offset % rule.window_columns - rule.window_columns // 2
    exists = (row >= 0) & (row < rule.key_rows) & (column >= 0) & (column < rule.key_columns)
    return torch.where(exists, row * rule.key_columns + column, -1)


def similar(q: Tensor, k: Tensor, rule: NeighbourhoodRule) -> Tensor:
    """Scores [B, Q, offsets] of q [B, Q, C] and k [B, K, C]; -10000 where there is no key."""
    keys = windows(rule)
    return torch.where(keys >= 0, (q[:, :, None] * k[:, keys]).sum(-1), -1e4)


def weighting(v: Tensor, weight: Tensor, rule: NeighbourhoodRule) -> Tensor:
    """Sums [B, Q, C] of v [B, K, C], weighted by [B, Q, offsets] where there is a key."""
    keys = windows(rule)
    return torch.where(keys >= 0, weight, 0.0)[:, :, None].matmul(v[:, keys])[:, :, 0]


def published(query: Tensor, kv: Tensor, rule: NeighbourhoodRule) -> Tensor:
    """Attention head by head as the callers of the published kernels compose it."""
    outs = []
    for head in range(query.shape[2]):
        q, (k, v) = query[:, :, head] * query.shape[-1] ** -0.5, kv[:, :, :, head].unbind(2)
        outs.append(weighting(v, similar(q, k, rule).softmax(-1), rule))
    return torch.cat(outs, -1)


@pytest.mark.parametrize("name", ["same_9x5", "causal_9x5", "cross3_5x5", "batch_expand_3x3"])
def test_the_kernels_restated_here_give_the_published_arrays(name: str) -> None:
    with np.load(VECTORS) as file:
        arrays = {k.split("/")[1]: torch.from_numpy(file[k]) for k in file if k.startswith(name)}

    def rows(key: str) -> Tensor:
        """[B, H, W, ...] or [B, C, H, W] as [B, H*W, last] in float64, to be differentiated."""
        values = arrays[key].double()
        if key in ("weight", "grad_similar", "similar", "weighting_grad_weight"):
            return values.flatten(1, 2).requires_grad_()
        return values.flatten(2).transpose(1, 2).clone().requires_grad_()

    window_rows, window_columns, causal = arrays["params_kH_kW_causal"].tolist()
    sizes = (*arrays["q"].shape[2:], *arrays["k"].shape[2:])
    rule = NeighbourhoodRule(*sizes, window_rows, window_columns, bool(causal))
    q, k, v, weight = (rows(key) for key in ("q", "k", "v", "weight"))
    group = len(q) // len(k)  # queries of several samples may share one sample's keys
    scores = similar(q, k.repeat_interleave(group, 0), rule)
    out = weighting(v.repeat_interleave(group, 0), weight, rule)
    results = {"similar": scores, "weighting": out}
    grads = torch.autograd.grad(scores, (q, k), rows("grad_similar"))
    results |= dict(zip(("similar_grad_q", "similar_grad_k"), grads, strict=True))
    grads = torch.autograd.grad(out, (v, weight), rows("grad_out"))
    results |= dict(zip(("weighting_grad_v", "weighting_grad_weight"), grads, strict=True))
    for key, value in results.items():
        torch.testing.assert_close(value, rows(key), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", [OWN, COARSE, replace(OWN, causal=True)], ids=str)
def test_one_grid_is_the_published_kernels(rule: NeighbourhoodRule) -> None:
    query, kv, text = draw(rule.queries), draw(rule.keys, 2), draw(0, 2)
    out = neighbourhood_attention(query, [kv], text, NO_TEXT, (rule,))
    expected = published(query, kv, rule)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    ours = torch.autograd.grad(out, (query, kv), grad)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (query, kv), grad))


@pytest.mark.parametrize("queries_at_once", [6, 12, 256])
@pytest.mark.parametrize("rules", [(OWN, COARSE), (replace(OWN, causal=True),)], ids=len)
def test_strips_of_rows_compute_what_the_operator_does(
    rules: tuple[NeighbourhoodRule, ...], queries_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in float64; on a CPU strips are what runs in float32."""
    monkeypatch.setattr(neighbourhood_sdpa, "STRIP", queries_at_once)
    neighbourhood_sdpa._strips.cache_clear()
    query, text = draw(36), draw(4, 2)
    grids = [draw(rule.keys, 2, seed=1) for rule in rules]
    arguments = (query, grids, text, torch.tensor([1, 4]), rules)
    outs = [function(*arguments) for function in (neighbourhood_attention, strips)]
    grads = [torch.autograd.grad(out.cos().sum(), (query, *grids, text)) for out in outs]
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*grads)
    narrow = [x.float() for x in grids]
    by_default = neighbourhood_attention(query.float(), narrow, text.float(), arguments[3], rules)
    assert torch.equal(by_default, strips(query.float(), narrow, text.float(), *arguments[3:]))
    torch.testing.assert_close(by_default.double(), outs[0], atol=1e-5, rtol=1e-5)


def test_one_softmax_goes_over_both_grids_and_real_text() -> None:
    """A third of the weight each, as all scores are equal; values tell where it went."""
    rules = (NeighbourhoodRule(2, 2, 2, 2, 3, 3), NeighbourhoodRule(2, 2, 2, 2, 3, 3))
    query = torch.zeros(1, 4, 1, 4)
    grids = [torch.full((1, 4, 2, 1, 4), value) for value in (1.0, 2.0)]
    text = torch.full((1, 6, 2, 1, 4), 6.0)
    out = neighbourhood_attention(query, grids, text, torch.tensor([4]), rules)
    torch.testing.assert_close(out, torch.full_like(out, (1 + 2 + 6) / 3))


def test_gradients_of_all_inputs_are_those_of_finite_differences() -> None:
    inputs = (draw(36)[:1, :, :1], draw(36, 2)[:1, :, :, :1], draw(6, 2)[:1, :, :, :1])
    query, own, coarse = (x.detach()[..., :2].requires_grad_() for x in inputs)
    text = draw(2, 2).detach()[:1, :, :, :1, :2].requires_grad_()
    length = torch.tensor([1])

    def attend(query: Tensor, own: Tensor, coarse: Tensor, text: Tensor) -> Tensor:
        return neighbourhood_attention(query, [own, coarse], text, length, (OWN, COARSE))

    assert torch.autograd.gradcheck(attend, (query, own, coarse, text), fast_mode=True)


def test_the_operator_passes_opcheck() -> None:
    grids, text = [draw(36, 2), draw(6, 2)], draw(3, 2)
    rules, seed = encode_rules((OWN, COARSE)), torch.tensor(3)
    arguments = (draw(36), grids, text, torch.tensor([1, 3]), rules, 0.2, seed, "reference")
    torch.library.opcheck(torch.ops.megavideo.neighbourhood_attention.default, arguments)


def test_dropout_draws_from_the_default_generator_and_keeps_the_mean() -> None:
    rule, query = NeighbourhoodRule(4, 4, 4, 4, 7, 7), torch.zeros(1, 16, 1, 4)
    kv, text = torch.ones(1, 16, 2, 1, 4), torch.ones(1, 0, 2, 1, 4)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(neighbourhood_attention(query, [kv], text, NO_TEXT[:1], (rule,), dropout=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    assert float(outs[0].mean()) == pytest.approx(1.0, abs=0.15)


def test_grids_that_do_not_fit_their_rules_are_errors() -> None:
    query, text = draw(36), draw(0, 2)
    with pytest.raises(ValueError, match="36 queries and 35 keys do not fit"):
        neighbourhood_attention(query, [draw(35, 2)], text, NO_TEXT, (OWN,))
    with pytest.raises(ValueError, match="1 grids and 2 rules"):
        neighbourhood_attention(query, [draw(36, 2)], text, NO_TEXT, (OWN, OWN))
    with pytest.raises(ValueError, match="are for different queries"):
        other = NeighbourhoodRule(4, 9, 4, 9, 3, 3)
        neighbourhood_attention(query, [draw(36, 2)] * 2, text, NO_TEXT, (OWN, other))
