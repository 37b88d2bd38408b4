"""`local_attention`: the one entry to image attention, and the torch operator behind it.

Operator `megavideo::local_attention` means what reference.py computes, on every device. Without
dropout, FlexAttention (GPU) and SDPA per block (CPU) compute the same faster; which one a run uses
is logged once.
"""

from functools import lru_cache

import torch
from torch import Tensor

from megavideo.layout.rules import Rule, decode_rule, encode_rule
from megavideo.log import log
from megavideo.ops import reference
from megavideo.ops.flex import flex_local_attention
from megavideo.ops.sdpa import sdpa_local_attention


def local_attention(
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    rule: Rule,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of image slots over real text and the image slots that `rule` shows them.

    Args:
        image_qkv: [B, V, 3, H, D], packed as the fused projection writes it.
        text_kv: [B, T, 2, H, D].
        text_length: int64 [B], real tokens of the T left-padded text slots, each at least 1.
        rule: over V = frames * side * side slots.
        dropout: on probabilities; draws a seed from torch's default generator.

    Returns: [B, V, H*D].
    """
    backend = _backend(image_qkv.device.type, image_qkv.dtype, dropout > 0)
    if backend == "flex":
        return flex_local_attention(image_qkv, text_kv, text_length, rule)
    if backend == "sdpa":
        return sdpa_local_attention(image_qkv, text_kv, text_length, rule)
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    return _operator(image_qkv, text_kv, text_length, encode_rule(rule), dropout, seed)[0]


@lru_cache(maxsize=16)
def _backend(device: str, dtype: torch.dtype, dropout: bool) -> str:
    backend = "reference"
    if not dropout and device == "cuda" and dtype in (torch.bfloat16, torch.float16):
        backend = "flex"
    elif not dropout and device == "cpu" and dtype == torch.float32:
        backend = "sdpa"
    noise = "with" if dropout else "without"
    log.info("attention on %s, %s, %s dropout: %s", device, dtype, noise, backend)
    return backend


@torch.library.custom_op("megavideo::local_attention", mutates_args=())
def _operator(
    image_qkv: Tensor, text_kv: Tensor, text_length: Tensor, rule: str, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    return reference.forward(image_qkv, text_kv, text_length, decode_rule(rule), dropout, int(seed))


@_operator.register_fake
def _(
    image_qkv: Tensor, text_kv: Tensor, text_length: Tensor, rule: str, dropout: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
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
    rule: str,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    return reference.backward(
        grad, image_qkv, text_kv, text_length, lse, decode_rule(rule), dropout, int(seed)
    )


@_backward_operator.register_fake
def _(grad, image_qkv, text_kv, text_length, lse, rule, dropout, seed):  # type: ignore[no-untyped-def]
    return torch.empty_like(image_qkv), torch.empty_like(text_kv)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    image_qkv, text_kv, text_length, ctx.rule, ctx.dropout, seed = inputs
    ctx.save_for_backward(image_qkv, text_kv, text_length, output[1], seed)


def _differentiate(ctx, grad, _):  # type: ignore[no-untyped-def]
    image_qkv, text_kv, text_length, lse, seed = ctx.saved_tensors
    grad_image, grad_text = _backward_operator(
        grad, image_qkv, text_kv, text_length, lse, ctx.rule, ctx.dropout, seed
    )
    return grad_image, grad_text, None, None, None, None


_operator.register_autograd(_differentiate, setup_context=_save)
