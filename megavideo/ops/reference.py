"""Local attention in the simplest code that can be right: a masked softmax per block of slots.

B batch, V image slots, T text slots, H heads, D head size, n slots of one block. Runs on any device
and type; softmax is computed in float32, or in float64 for float64 inputs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megavideo.layout.render import Block, blocks
from megavideo.layout.rules import Rule, text_visible
from megavideo.ops.masked_softmax import MaskedSoftmax, compute_dtype, dropout_generator


def forward(
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    rule: Rule,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return (output [B, V, H*D], log-sum-exp of each query's scores [B, H, V]).

    Args:
        image_qkv: [B, V, 3, H, D], queries, keys and values of the image slots.
        text_kv: [B, T, 2, H, D], keys and values of the text slots.
        text_length: int64 [B], real tokens at the end of the T slots; at least 1.
        dropout: probability with which an attention probability is set to 0.
        seed: of the dropout; the same seed gives the same zeros in `backward`.
    """
    batch, slots, _, heads, _ = image_qkv.shape
    out = torch.empty_like(image_qkv[:, :, 0])
    lse = torch.empty(batch, heads, slots, dtype=compute_dtype(image_qkv), device=out.device)
    for places, softmax in _parts(image_qkv, text_kv, text_length, rule, dropout, seed):
        lse[:, :, places] = softmax.lse
        out[:, places] = softmax.output().transpose(1, 2).to(out.dtype)
    return out.flatten(2), lse


def backward(
    grad: Tensor,
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    lse: Tensor,
    rule: Rule,
    dropout: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of (image_qkv, text_kv), given that of the output, [B, V, H*D]."""
    _, _, _, heads, size = image_qkv.shape
    text_slots = text_kv.shape[1]
    grad_image = torch.zeros_like(image_qkv, dtype=lse.dtype)
    grad_text = torch.zeros_like(text_kv, dtype=lse.dtype)
    grad = grad.unflatten(2, (heads, size))
    for places, softmax in _parts(image_qkv, text_kv, text_length, rule, dropout, seed):
        do = grad[:, places].transpose(1, 2).to(lse.dtype)
        dq, dk, dv = softmax.gradients(do, lse[:, :, places])
        grad_kv = torch.stack([dk, dv], dim=-2).transpose(1, 2).transpose(2, 3)
        grad_text += grad_kv[:, :text_slots]
        grad_image[:, places, 1:] = grad_kv[:, text_slots:]
        grad_image[:, places, 0] = dq.transpose(1, 2)
    return grad_image.to(image_qkv.dtype), grad_text.to(text_kv.dtype)


def _parts(
    image_qkv: Tensor, text_kv: Tensor, text_length: Tensor, rule: Rule, dropout: float, seed: int
) -> Iterator[tuple[Tensor, MaskedSoftmax]]:
    """Each block's slots, and their attention over text and block."""
    device, dtype = image_qkv.device, compute_dtype(image_qkv)
    generator = dropout_generator(dropout, seed, device)
    text_slots = text_kv.shape[1]
    real_text = text_visible(
        torch.arange(text_slots, device=device), text_length[:, None], text_slots
    )
    for block in blocks(rule):
        slots = torch.from_numpy(block.slots).to(device)
        q, k, v = image_qkv[:, slots].to(dtype).permute(2, 0, 3, 1, 4)
        text_k, text_v = text_kv.to(dtype).permute(2, 0, 3, 1, 4)
        k, v = torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)
        visible = _visible(block, real_text)
        yield slots, MaskedSoftmax.of(q, k, v, visible, dropout, generator)


def _visible(block: Block, real_text: Tensor) -> Tensor:
    """bool [B, 1, n, T+n]."""
    image = torch.from_numpy(block.visible).to(real_text.device)
    text = real_text[:, None, :].expand(-1, len(image), -1)
    return torch.cat([text, image.expand(len(text), -1, -1)], 2)[:, None]
