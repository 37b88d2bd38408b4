"""Where a channel's attention goes: its probability mass over text, own frame, other frames.

B rows, V image slots, T text slots, H heads, D head size, n slots of one block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megavideo.layout.render import blocks
from megavideo.layout.rules import Rule, text_visible
from megavideo.ops.local_attention import local_attention
from megavideo.ops.masked_softmax import MaskedSoftmax, compute_dtype

# What a key may be to a query: the columns of the result.
KINDS = ("text", "own frame", "earlier frames", "later frames")


class MassRecorder:
    """Takes a channel's place in computing attention, and adds up where the mass goes.

    Only queries behind the first frame count: those of the first have no other frame to look at.
    """

    def __init__(self, rule: Rule, heads: int):
        self.rule = rule
        self._sum = torch.zeros(heads, len(KINDS), dtype=torch.float64)
        self._queries = 0

    @property
    def mass(self) -> Tensor:
        """Mean probability that a query gives to each kind of key, float64 [H, kinds]."""
        return self._sum / max(self._queries, 1)

    def attend(self, image_qkv: Tensor, text_kv: Tensor | None, text_length: Tensor) -> Tensor:
        """What `local_attention` gives; counts on the way. [B, V, 3, H, D], ... -> [B, V, h]."""
        assert text_kv is not None
        for probabilities, kinds in self._probabilities(image_qkv, text_kv, text_length):
            for kind in range(len(KINDS)):
                mass = (probabilities * (kinds == kind)).sum((0, 2, 3))
                self._sum[:, kind] += mass.double().cpu()
        per_frame = self.rule.side**2
        self._queries += len(image_qkv) * (self.rule.frames - 1) * per_frame
        return local_attention(image_qkv, text_kv, text_length, self.rule)

    def _probabilities(
        self, image_qkv: Tensor, text_kv: Tensor, text_length: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each block: probabilities [B, H, n, T+n], and what each key is to each query."""
        dtype, device, text = compute_dtype(image_qkv), image_qkv.device, text_kv.shape[1]
        real = text_visible(torch.arange(text, device=device), text_length[:, None], text)
        text_k = text_kv[:, :, 0].to(dtype).transpose(1, 2)
        for block in blocks(self.rule):
            slots = torch.from_numpy(block.slots).to(device)
            later = slots[slots >= self.rule.side**2]
            rows = torch.from_numpy(block.visible).to(device)[slots >= self.rule.side**2]
            q = image_qkv[:, later, 0].to(dtype).transpose(1, 2)
            k = torch.cat([text_k, image_qkv[:, slots, 1].to(dtype).transpose(1, 2)], 2)
            seen = [real[:, None].expand(-1, len(later), -1), rows.expand(len(real), -1, -1)]
            scores = MaskedSoftmax.of(q, k, k, torch.cat(seen, 2)[:, None], 0.0, None).scores
            yield scores.softmax(-1), self._kinds(later, slots, text)

    def _kinds(self, queries: Tensor, keys: Tensor, text: int) -> Tensor:
        """Index into KINDS, int64 [n, T+n]."""
        per_frame = self.rule.side**2
        ahead = keys // per_frame - queries[:, None] // per_frame
        kinds = torch.where(ahead == 0, 1, torch.where(ahead < 0, 2, 3))
        return torch.cat([kinds.new_zeros(len(queries), text), kinds], 1)
