"""`local_attention`: the one entry to image attention, and the torch operator behind it.

Operator `megavideo::local_attention` means what reference.py computes; its argument `backend` says
whether that file or the CUDA kernels compute it. FlexAttention and SDPA are differentiable torch
code and need no operator. backends.py chooses.
"""

import torch
from torch import Tensor

from megavideo.layout.rules import Rule, decode_rule, encode_rule
from megavideo.ops import interval, library, reference
from megavideo.ops.backends import atomic_backward, choose
from megavideo.ops.flex import flex_local_attention
from megavideo.ops.sdpa import sdpa_local_attention


def local_attention(
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    rule: Rule,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention of image slots over real text and the image slots that `rule` shows them.

    Args:
        image_qkv: [B, V, 3, H, D], packed as the fused projection writes it.
        text_kv: [B, T, 2, H, D].
        text_length: int64 [B], real tokens of the T left-padded text slots, each at least 1.
        rule: over V = frames * side * side slots.
        dropout: on probabilities.
        seed: of the dropout, int64 scalar; without it, drawn from torch's default generator.

    Returns: [B, V, H*D].
    """
    device, dtype, size = image_qkv.device.type, image_qkv.dtype, image_qkv.shape[-1]
    backend = choose(device, dtype, size, dropout > 0, rule.family)
    if backend == "flex":
        return flex_local_attention(image_qkv, text_kv, text_length, rule)
    if backend == "sdpa":
        return sdpa_local_attention(image_qkv, text_kv, text_length, rule)
    if seed is None:
        seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    name, atomic = encode_rule(rule), backend == "library" and atomic_backward()
    return _operator(image_qkv, text_kv, text_length, name, dropout, seed, backend, atomic)[0]


@torch.library.custom_op("megavideo::local_attention", mutates_args=())
def _operator(
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    rule: str,
    dropout: float,
    seed: Tensor,
    backend: str = "reference",
    atomic: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output, and lse; `atomic` chooses how the kernels' backward pass works (ops/interval.py)."""
    arguments = (image_qkv, text_kv, text_length, decode_rule(rule), dropout, int(seed))
    if backend == "library":
        return interval.forward(library.load(), *arguments)
    return reference.forward(*arguments)


@_operator.register_fake
def _(  # type: ignore[no-untyped-def]
    image_qkv, text_kv, text_length, rule, dropout, seed, backend="reference", atomic=False
):
    batch, slots, _, heads, size = image_qkv.shape
    wide = torch.promote_types(image_qkv.dtype, torch.float32)
    return (
        image_qkv.new_empty(batch, slots, heads * size),
        image_qkv.new_empty(batch, heads, slots, dtype=wide),
    )


@torch.library.custom_op("megavideo::local_attention_backward", mutates_args=())
def _backward_operator(
    grad: Tensor,
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    lse: Tensor,
    out: Tensor | None,
    rule: str,
    dropout: float,
    seed: Tensor,
    backend: str,
    atomic: bool,
    text_needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of image_qkv and text_kv; the latter is empty unless needed.

    `out` is for the kernels: with it they need no first pass over all keys.
    """
    given, noise = (image_qkv, text_kv, text_length), (decode_rule(rule), dropout, int(seed))
    grad_text: Tensor | None
    if backend == "library":
        assert out is not None
        grad_image, grad_text = interval.backward(
            library.load(), grad, *given, out, lse, *noise, text_needs_grad, atomic
        )
    else:
        grad_image, grad_text = reference.backward(grad, *given, lse, *noise)
    if grad_text is None or not text_needs_grad:
        grad_text = text_kv.new_empty(0)
    return grad_image, grad_text


@_backward_operator.register_fake
def _(  # type: ignore[no-untyped-def]
    grad,
    image_qkv,
    text_kv,
    text_length,
    lse,
    out,
    rule,
    dropout,
    seed,
    backend,
    atomic,
    text_needs_grad,
):
    grad_text = torch.empty_like(text_kv, memory_format=torch.contiguous_format)
    return (
        torch.empty_like(image_qkv, memory_format=torch.contiguous_format),
        grad_text if text_needs_grad else text_kv.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    image_qkv, text_kv, text_length, ctx.rule, ctx.dropout, seed, ctx.backend, ctx.atomic = inputs
    out, lse = output
    kept = out if ctx.backend == "library" else None
    ctx.save_for_backward(image_qkv, text_kv, text_length, lse, kept, seed)


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    *tensors, seed = ctx.saved_tensors
    text_needs_grad = ctx.needs_input_grad[1]
    how = (ctx.rule, ctx.dropout, seed, ctx.backend, ctx.atomic)
    grad_image, grad_text = _backward_operator(grad, *tensors, *how, text_needs_grad)
    return grad_image, grad_text if text_needs_grad else None, *[None] * 6


_operator.register_autograd(_differentiate, setup_context=_save)
