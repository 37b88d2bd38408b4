"""Local attention by torch's FlexAttention: the fast path on a GPU where attention has no dropout.

The block mask depends on the layout alone and is built once; how much text each sample has is read
by the mask function, so every block that holds text counts as partly visible.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from megavideo.layout.rules import Rule, text_visible
from megavideo.ops.cache import keep_code_private

BLOCK = 128

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_local_attention(
    image_qkv: Tensor, text_kv: Tensor, text_length: Tensor, rule: Rule
) -> Tensor:
    """Output [B, V, H*D]; arguments as in reference.forward. Differentiable on CUDA only."""
    q, k, v = image_qkv.permute(2, 0, 3, 1, 4)
    text_k, text_v = text_kv.permute(2, 0, 3, 1, 4)
    k, v = torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)
    mask = _for_batch(_layout_mask(rule, text_kv.shape[1], str(q.device)), rule, text_length)
    attend: Any = _compiled() if q.is_cuda else flex_attention
    return attend(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)


@lru_cache(maxsize=1)
def _compiled() -> Any:
    keep_code_private()
    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=64)
def _layout_mask(rule: Rule, text_slots: int, device: str) -> BlockMask:
    slots = rule.frames * rule.side * rule.side

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        # One hidden column keeps a block with text from being taken as wholly visible.
        text = k % BLOCK != 0
        return torch.where(k < text_slots, text, rule(q, k - text_slots))

    return create_block_mask(visible, None, None, slots, text_slots + slots, device, BLOCK)


def _for_batch(mask: BlockMask, rule: Rule, text_length: Tensor) -> BlockMask:
    """The same visible blocks, with the samples' text lengths in the mask function."""
    queries, keys = mask.seq_lengths
    text_slots = keys - queries

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        text = text_visible(k, text_length[b], text_slots)
        return torch.where(k < text_slots, text, rule(q, k - text_slots))

    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        mask.kv_indices,
        mask.full_kv_num_blocks,
        mask.full_kv_indices,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=visible,
        seq_lengths=mask.seq_lengths,
    )
