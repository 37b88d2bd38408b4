"""Neighbourhood attention by libmegavideo: tensors in, tensors out, for layout/neighbourhood.py.

The C side is kernels/include/megavideo.h, which says what each field means. B samples, Q queries, K
keys of one grid, T text slots, H heads, D head size.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from megavideo.layout.neighbourhood import NeighbourhoodRule
from megavideo.ops.c_call import ELEMENTS, Strides, aligned, call, dropout_threshold

MAX_GRIDS = 2


class _Grid(ctypes.Structure):
    """MegavideoKeyGrid."""

    _sizes = ("rows", "columns", "window_rows", "window_columns", "causal")
    _fields_ = [
        *((name, ctypes.c_int32) for name in _sizes),
        ("kv", ctypes.c_void_p),
        ("strides", Strides),
        ("grad_kv", ctypes.c_void_p),
    ]


class _Problem(ctypes.Structure):
    """MegavideoNeighbourhoodAttention."""

    _sizes = ("element", "batch", "heads", "head_size", "rows", "columns", "text_slots")
    _fields_ = [
        *((name, ctypes.c_int32) for name in (*_sizes, "num_grids", "dropout")),
        ("seed", ctypes.c_uint64),
        ("text_length", ctypes.c_void_p),
        *(("query", ctypes.c_void_p), ("query_strides", Strides)),
        *(("text_kv", ctypes.c_void_p), ("text_strides", Strides)),
        ("grids", _Grid * MAX_GRIDS),
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        *((name, ctypes.c_void_p) for name in ("grad_out", "delta", "grad_query", "grad_text")),
    ]


def forward(
    library: Any,
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return (output [B, Q, H*D], log-sum-exp float32 [B, H, Q]).

    Args:
        library: what `library.load` gives.
        query, grids, text_kv, text_length, rules: as in neighbourhood_reference.forward, one or two
            grids, bfloat16 or float16, D 64 or 128.
        dropout: rounded to n/256, because one random byte decides.
        seed: of the dropout; `backward` needs the same.
    """
    query, grids, text_kv = aligned(query), [aligned(kv) for kv in grids], aligned(text_kv)
    batch, queries, heads, size = query.shape
    out = query.new_empty(batch, queries, heads * size)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    problem = _problem(query, grids, text_kv, text_length, rules, dropout, seed, out, lse)
    call(library, "megavideo_neighbourhood_forward", problem, query.device)
    return out, lse


def backward(
    library: Any,
    grad: Tensor,
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    out: Tensor,
    lse: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Return the gradients of (query, grids, text_kv), given that of the output, [B, Q, H*D]."""
    query, grids, text_kv = aligned(query), [aligned(kv) for kv in grids], aligned(text_kv)
    problem = _problem(query, grids, text_kv, text_length, rules, dropout, seed, out, lse)
    grad, delta = aligned(grad.contiguous()), torch.empty_like(lse)
    grad_query, grad_text, *grad_grids = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in (query, text_kv, *grids)
    )
    problem.grad_out, problem.delta = grad.data_ptr(), delta.data_ptr()
    problem.grad_query, problem.grad_text = grad_query.data_ptr(), grad_text.data_ptr()
    for i, tensor in enumerate(grad_grids):
        problem.grids[i].grad_kv = tensor.data_ptr()
    call(library, "megavideo_neighbourhood_backward", problem, query.device)
    return grad_query, grad_grids, grad_text


def _problem(
    query: Tensor,
    grids: list[Tensor],
    text_kv: Tensor,
    text_length: Tensor,
    rules: tuple[NeighbourhoodRule, ...],
    dropout: float,
    seed: int,
    out: Tensor,
    lse: Tensor,
) -> _Problem:
    batch, _, heads, size = query.shape
    sample, slot, head, _ = query.stride()
    rows, columns = rules[0].rows, rules[0].columns
    assert text_length.dtype == torch.int64 and text_length.is_contiguous()
    return _Problem(
        *(ELEMENTS[query.dtype], batch, heads, size, rows, columns, text_kv.shape[1]),
        *(len(grids), dropout_threshold(dropout), seed, text_length.data_ptr()),
        *(query.data_ptr(), Strides(sample, slot, 0, head)),
        *(text_kv.data_ptr(), Strides(*text_kv.stride()[:4])),
        (_Grid * MAX_GRIDS)(*(_grid(rule, kv) for rule, kv in zip(rules, grids, strict=True))),
        *(out.data_ptr(), lse.data_ptr()),
    )


def _grid(rule: NeighbourhoodRule, kv: Tensor) -> _Grid:
    window = (rule.window_rows, rule.window_columns, int(rule.causal))
    return _Grid(rule.key_rows, rule.key_columns, *window, kv.data_ptr(), Strides(*kv.stride()[:4]))
