"""States to the loss: logits of loss-carrying frames over image codes, and their cross-entropy."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.model.layers import Streams, as_copy, layer_norm


class Head(nn.Module):
    """Final LayerNorm, then the word embedding's image rows as a tied output matrix without bias.

    The published code computes all 150,010 columns at all 2,064 slots and slices afterwards; only
    image columns at loss-carrying slots ever reach the loss, so only those are computed.

    Args:
        word: the embedding's word table, [vocabulary, h].
        codes: image codes, the first rows of it.
        per_frame: tokens N of a frame.
        frames: frames that carry loss.
    """

    name = "head"

    def __init__(
        self,
        word: nn.Parameter,
        codes: int,
        per_frame: int,
        frames: Sequence[int],
        norm_eps: float,
    ):
        super().__init__()
        self.norm = layer_norm(word.shape[1], norm_eps)
        self.word = word
        self.codes = codes
        self.per_frame = per_frame
        self.frames = list(frames)

    def untie(self) -> None:
        """Hold the image rows alone, as a frozen copy: for a process without the embedding."""
        rows = self.word.detach()[: self.codes].clone()
        self.word = as_copy(nn.Parameter(rows, requires_grad=False))

    def forward(self, streams: Streams) -> Tensor:
        """Logits [B, loss frames, N, codes], in float32 or wider."""
        _, image, _ = streams
        return self.logits(image.unflatten(1, (-1, self.per_frame))[:, self.frames])

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., codes] of states [..., h], in float32 or wider."""
        logits = F.linear(self.norm(states), self.word[: self.codes])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def frame_losses(logits: Tensor, image: Tensor, frames: Sequence[int]) -> Tensor:
    """Mean cross-entropy of each loss frame, [loss frames]; the loss of a batch is their mean.

    Args:
        logits: [B, loss frames, N, codes], the head's.
        image: int64 [B, F, N], the sample's tokens; `frames` says which of them carry loss.
    """
    labels = image[:, list(frames)]
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view(labels.shape).mean(dim=(0, 2))
