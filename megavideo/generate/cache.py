"""The keys and values that a channel has met, and attention over them (docs/generate.md 2).

B rows, T text slots, H heads, D head size, n image slots computed at once. The model knows only
that a channel may have a cache; what is kept and seen follows from the layout's rules.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megavideo.generate.places import places
from megavideo.layout.rules import Rule, text_visible


@dataclass
class Cursor:
    """What the caches of all layers share: the image slots that are computed now.

    Attributes:
        slots: int64 [n], in the order of the rows that channels are given.
        first: whether this is the first pass, over text and all given frames at once.
    """

    slots: np.ndarray
    first: bool = True


@dataclass(frozen=True)
class TextWeight:
    """Added to the scores of text keys, [B] each: 0 leaves attention as trained."""

    first_pass: Tensor
    steps: Tensor


class ChannelCache:
    """Keys and values of one channel, each [B, H, places, D], allocated by the first pass.

    Args:
        rule: who sees whom.
        first_rule: the same among given frames; another one only in reference_compat.py.
        cursor: moved by the decoder.
        weight: of text keys in this channel.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, rule: Rule, first_rule: Rule, cursor: Cursor, weight: TextWeight):
        self.rule = rule
        self.first_rule = first_rule
        self.cursor = cursor
        self.weight = weight
        self.bias: Tensor | None = None

    def attend(self, image_qkv: Tensor, text_kv: Tensor | None, text_length: Tensor) -> Tensor:
        """What the cursor's slots gather, [B, n, H*D].

        Args:
            image_qkv: [B, n, 3, H, D] of these slots.
            text_kv: [B, T, 2, H, D] in the first pass, None after it.
            text_length: int64 [B], real tokens of the T left-padded text slots.
        """
        q, k, v = image_qkv.permute(2, 0, 3, 1, 4)
        if self.cursor.first:
            assert text_kv is not None
            text_k, text_v = text_kv.permute(2, 0, 3, 1, 4)
            return self._first_pass(q, k, v, text_k, text_v, text_length)
        return self._step(q, k, v)

    def _first_pass(
        self, q: Tensor, k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor, text_length: Tensor
    ) -> Tensor:
        self._keep(text_k, text_v, k, v)
        text = text_k.shape[2]
        bias = _text_bias(text_length, text, self.weight.steps, k.dtype)
        if bias.any():  # without padding and weight, steps need no mask
            self.bias = F.pad(bias, (0, self.places.longest - text))
        slots = self.cursor.slots
        hidden = torch.from_numpy(~self.first_rule(slots[:, None], slots[None, :])).to(k.device)
        seen = torch.zeros(hidden.shape, dtype=k.dtype, device=k.device)
        bias = _text_bias(text_length, text, self.weight.first_pass, k.dtype)
        rows, n = len(bias), len(slots)
        mask = torch.cat(
            [
                bias.expand(-1, -1, n, -1),
                seen.masked_fill(hidden, -torch.inf).expand(rows, 1, -1, -1),
            ],
            -1,
        )
        return _attention(q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2), mask)

    def _keep(self, text_k: Tensor, text_v: Tensor, k: Tensor, v: Tensor) -> None:
        """Allocate, and fill in the text once for every run, and the given frames."""
        rows, heads, text, size = text_k.shape
        self.places = places(self.rule, text)
        kept = self.places
        self.runs = np.stack([kept.place, kept.begin, kept.end], 1).tolist()
        self.keys, self.values = (
            text_k.new_empty(rows, heads, self.places.size, size) for _ in range(2)
        )
        for run in self.places.runs:
            self.keys[:, :, run : run + text] = text_k
            self.values[:, :, run : run + text] = text_v
        if not self.rule.own_frame:  # where a finished frame is never looked at again
            given = torch.from_numpy(self.places.place[self.cursor.slots]).to(k.device)
            self.keys[:, :, given] = k
            self.values[:, :, given] = v

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (slot,) = self.cursor.slots.tolist()
        place, begin, end = self.runs[slot]
        self.keys[:, :, place : place + 1] = k
        self.values[:, :, place : place + 1] = v
        mask = None if self.bias is None else self.bias[..., : end - begin]
        return _attention(q, self.keys[:, :, begin:end], self.values[:, :, begin:end], mask)


def _text_bias(text_length: Tensor, text: int, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, T]: the weight for real text, -inf for padding."""
    slots = torch.arange(text, device=text_length.device)
    real = text_visible(slots, text_length[:, None], text)
    bias = torch.where(real, weight[:, None].to(slots.device, torch.float64), -torch.inf)
    return bias.to(dtype)[:, None, None]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, H, n, D] over [B, H, keys, D] -> [B, n, H*D]; `mask` is added to the scores."""
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
