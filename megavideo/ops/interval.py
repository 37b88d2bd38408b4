"""Interval attention by libmegavideo: tensors in, tensors out, for the rules of layout/rules.py.

The C side is kernels/include/megavideo.h, which says what each field means. B samples, V image
slots, T text slots, H heads, D head size.
"""

import ctypes
from dataclasses import astuple
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megavideo.layout.intervals import intervals
from megavideo.layout.rules import Rule
from megavideo.ops.c_call import ELEMENTS, Strides, aligned, call, dropout_threshold


class _Problem(ctypes.Structure):
    """MegavideoIntervalAttention."""

    _sizes = ("element", "batch", "heads", "head_size", "image_slots", "text_slots", "places")
    _layout = ("slots", "begin", "end", "bounds", "seen_by", "text_length")
    _fields_ = [
        *((name, ctypes.c_int32) for name in (*_sizes, "dropout")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in (*_layout, "image_qkv", "text_kv")),
        ("image", Strides),
        ("text", Strides),
        *((name, ctypes.c_void_p) for name in ("out", "lse")),
        *((name, ctypes.c_void_p) for name in ("grad_out", "delta", "grad_image", "grad_text")),
        ("workspace", ctypes.c_void_p),
    ]


def forward(
    library: Any,
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    rule: Rule,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return (output [B, V, H*D], log-sum-exp float32 [B, H, V]).

    Args:
        library: what `library.load` gives.
        image_qkv, text_kv, text_length: as in reference.forward, bfloat16 or float16, D 64 or 128.
        dropout: rounded to n/256, because one random byte decides.
        seed: of the dropout; `backward` needs the same.
    """
    batch, slots, _, heads, size = image_qkv.shape
    image_qkv, text_kv = aligned(image_qkv), aligned(text_kv)
    out = image_qkv.new_empty(batch, slots, heads * size)
    lse = image_qkv.new_empty(batch, heads, slots, dtype=torch.float32)
    problem = _problem(image_qkv, text_kv, text_length, rule, dropout, seed, out, lse)
    call(library, "megavideo_interval_forward", problem, image_qkv.device)
    return out, lse


def backward(
    library: Any,
    grad: Tensor,
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: Rule,
    dropout: float,
    seed: int,
    text_needs_grad: bool = True,
    atomic: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of (image_qkv, text_kv), given that of the output, [B, V, H*D].

    The gradient of text is None unless it is needed: its tiles cost a tenth of the products.
    With `atomic`, one pass over pairs adds up the gradients of queries in float32, in whatever
    order; without, two passes give the same bits in each run.
    """
    grad, image_qkv, text_kv = aligned(grad.contiguous()), aligned(image_qkv), aligned(text_kv)
    problem = _problem(image_qkv, text_kv, text_length, rule, dropout, seed, out, lse)
    delta = torch.empty_like(lse)
    grad_image = torch.empty_like(image_qkv, memory_format=torch.contiguous_format)
    grad_text = torch.empty_like(text_kv, memory_format=torch.contiguous_format)
    problem.grad_out, problem.delta = grad.data_ptr(), delta.data_ptr()
    problem.grad_image = grad_image.data_ptr()
    problem.grad_text = grad_text.data_ptr() if text_needs_grad else None
    if atomic:
        size = library.megavideo_interval_workspace(ctypes.byref(problem))
        workspace = image_qkv.new_empty(size, dtype=torch.uint8)
        problem.workspace = workspace.data_ptr()
    call(library, "megavideo_interval_backward", problem, image_qkv.device)
    return grad_image, grad_text if text_needs_grad else None


def _problem(
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    rule: Rule,
    dropout: float,
    seed: int,
    out: Tensor,
    lse: Tensor,
) -> _Problem:
    batch, slots, _, heads, size = image_qkv.shape
    layout = _layout(rule, image_qkv.device)
    assert text_length.dtype == torch.int64 and text_length.is_contiguous()
    tensors = (*layout, text_length, image_qkv, text_kv)
    return _Problem(
        *(ELEMENTS[image_qkv.dtype], batch, heads, size, slots, text_kv.shape[1], len(layout[0])),
        *(dropout_threshold(dropout), seed),
        *(tensor.data_ptr() for tensor in tensors),
        *(Strides(*image_qkv.stride()[:4]), Strides(*text_kv.stride()[:4])),
        *(out.data_ptr(), lse.data_ptr()),
    )


@lru_cache(maxsize=64)
def _layout(rule: Rule, device: torch.device) -> tuple[Tensor, ...]:
    """slots, begin, end, bounds, seen_by; kept, because they are small and used by each layer."""
    return tuple(torch.from_numpy(array).to(device) for array in astuple(intervals(rule)))
