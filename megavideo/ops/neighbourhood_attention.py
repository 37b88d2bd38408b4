"""`neighbourhood_attention`: attention of super-resolution, and the torch operator behind it.

Operator `megavideo::neighbourhood_attention` means what neighbourhood_reference.py computes; its
argument `backend` says whether that file or the CUDA kernels compute it. SDPA is differentiable
torch code and needs no operator.
"""

from functools import lru_cache

import torch
from torch import Tensor

from megavideo.layout.neighbourhood import NeighbourhoodRule, decode_rules, encode_rules
from megavideo.log import log
from megavideo.ops import library, neighbourhood
from megavideo.ops import neighbourhood_reference as reference
from megavideo.ops.backends import library_obstacle
from megavideo.ops.neighbourhood_sdpa import sdpa_neighbourhood_attention


def neighbourhood_attention(
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float = 0.0,
) -> Tensor:
    """Attention of a grid of queries over windows of one or two grids of keys, and over real text.

    Args:
        query: [B, Q, H, D].
        grids: keys and values [B, K, 2, H, D] of each grid; one softmax goes over all of them.
        text_kv: [B, T, 2, H, D]; T may be 0.
        text_length: int64 [B], real tokens of the T left-padded text slots, each at least 1.
        rules: who sees whom in each grid; all have the rows and columns of the queries.
        dropout: on probabilities; draws a seed from torch's default generator.

    Returns: [B, Q, H*D].

    Raises:
        ValueError: if grids and rules do not fit each other.
    """
    _check(query, grids, rules)
    backend = _backend(query.device, query.dtype, query.shape[-1], dropout > 0)
    if backend == "sdpa":
        return sdpa_neighbourhood_attention(query, grids, text_kv, text_length, rules)
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    name = encode_rules(rules)
    return _operator(query, grids, text_kv, text_length, name, dropout, seed, backend)[0]


def _check(query: Tensor, grids: list[Tensor], rules: tuple[NeighbourhoodRule, ...]) -> None:
    if not 1 <= len(grids) == len(rules) <= neighbourhood.MAX_GRIDS:
        raise ValueError(f"{len(grids)} grids and {len(rules)} rules: give one or two of each")
    for kv, rule in zip(grids, rules, strict=True):
        if (rule.rows, rule.columns) != (rules[0].rows, rules[0].columns):
            raise ValueError(f"{rule} and {rules[0]} are for different queries")
        if (rule.queries, rule.keys) != (query.shape[1], kv.shape[1]):
            raise ValueError(f"{query.shape[1]} queries and {kv.shape[1]} keys do not fit {rule}")


@lru_cache(maxsize=16)
def _backend(device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    """`library` where it can run and agrees with the reference, which a first call finds out.

    Else SDPA, but not with dropout, nor on a CPU in types that are there for exactness.
    """
    reason = library_obstacle(device.type, dtype, head_size, dropout)
    reason = reason or _disagreement(device, dtype, head_size)
    exact = dropout or (device.type == "cpu" and dtype != torch.float32)
    backend = "library" if not reason else "reference" if exact else "sdpa"
    because = f"; not library ({reason})" if reason else ""
    log.info("neighbourhood attention on %s, %s: %s%s", device.type, dtype, backend, because)
    return backend


def _disagreement(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """In words, how the kernels differ from the reference on a small problem; empty if not."""
    rules = (NeighbourhoodRule(9, 12, 9, 12, 5, 3), NeighbourhoodRule(9, 12, 3, 4, 3, 3))
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        rows = (2, *shape, 1, head_size)
        return torch.randn(rows, generator=generator, device=device).to(dtype)

    length = torch.tensor([2, 9], device=device)
    given = (draw(rules[0].queries), [draw(rule.keys, 2) for rule in rules], draw(9, 2), length)
    grad = draw(rules[0].queries).flatten(2)
    results = []
    for backend in ("library", "reference"):
        arguments = (*given, encode_rules(rules), 0.0, torch.tensor(0), backend)
        out, lse = _operator(*arguments)
        query, grids, text = _backward_operator(grad, *given, out, lse, *arguments[4:])
        results.append([out, lse, query, *grids, text])
    for ours, expected in zip(*results, strict=True):
        error = (ours.float() - expected.float()).abs().max() / expected.float().abs().max()
        if not error < 0.03:
            return f"it differs from the reference by {float(error):.2g}; please report this"
    return ""


@torch.library.custom_op("megavideo::neighbourhood_attention", mutates_args=())
def _operator(
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: str,
    dropout: float,
    seed: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = (query, grids, text_kv, text_length, decode_rules(rules), dropout, int(seed))
    if backend == "library":
        return neighbourhood.forward(library.load(), *arguments)
    return reference.forward(*arguments)


@_operator.register_fake
def _(query, grids, text_kv, text_length, rules, dropout, seed, backend):  # type: ignore[no-untyped-def]
    batch, queries, heads, size = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(batch, queries, heads * size),
        query.new_empty(batch, heads, queries, dtype=wide),
    )


@torch.library.custom_op("megavideo::neighbourhood_attention_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    out: Tensor,
    lse: Tensor,
    rules: str,
    dropout: float,
    seed: Tensor,
    backend: str,
) -> tuple[Tensor, list[Tensor], Tensor]:
    given, noise = (query, grids, text_kv, text_length), (decode_rules(rules), dropout, int(seed))
    if backend == "library":
        return neighbourhood.backward(library.load(), grad, *given, out, lse, *noise)
    return reference.backward(grad, *given, lse, *noise)


@_backward_operator.register_fake
def _(grad, query, grids, text_kv, text_length, out, lse, rules, dropout, seed, backend):  # type: ignore[no-untyped-def]
    def packed(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    return packed(query), [packed(kv) for kv in grids], packed(text_kv)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, grids, text_kv, text_length, ctx.rules, ctx.dropout, seed, ctx.backend = inputs
    ctx.save_for_backward(query, text_kv, text_length, *output, seed, *grids)


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    query, text_kv, text_length, out, lse, seed, *grids = ctx.saved_tensors
    noise = (ctx.rules, ctx.dropout, seed, ctx.backend)
    grad_query, grad_grids, grad_text = _backward_operator(
        grad, query, grids, text_kv, text_length, out, lse, *noise
    )
    return grad_query, grad_grids, grad_text, None, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)
