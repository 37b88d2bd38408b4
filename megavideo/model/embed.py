"""Tokens to states: word plus position, each frame shifted by one behind begin-of-image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.config.schema import ModelConfig
from megavideo.model.layers import Streams
from megavideo.parallel.shard import Shard, set_shard


class Embedding(nn.Module):
    """Word table, base positions (text and first frame), trainable positions of later frames.

    Positions are looked up by slot (docs/model.md 2): padding has position 0, real text 0..k-1,
    the first frame `image_position`.., and later frames their own table.
    """

    name = "embedding"

    def __init__(self, model: ModelConfig, frames: int, dropout: float):
        super().__init__()
        self.model = model
        self.frames = frames
        self.word = nn.Parameter(torch.empty(model.vocab_size, model.hidden))
        set_shard(self.word, Shard(dim=0, padded=True))
        self.position = nn.Parameter(torch.empty(model.position_rows, model.hidden))
        if frames > 1:
            self.frame_position = nn.Parameter(torch.empty(model.frame_position_rows, model.hidden))
        self.dropout = nn.Dropout(dropout)

    def forward(self, batch: Streams) -> Streams:
        """(text int64 [B,T], text_length [B], image int64 [B,F,N]) -> the two streams."""
        text, text_length, image = batch
        image_states = self.image_states(self.shifted(image), self.image_positions())
        return self.text_states(text, text_length), image_states, text_length

    def text_states(self, text: Tensor, text_length: Tensor) -> Tensor:
        """[B, T, h] of left-padded text."""
        positions = text_positions(text_length, text.shape[1])
        return self.dropout(F.embedding(text, self.word) + F.embedding(positions, self.position))

    def image_states(self, inputs: Tensor, positions: Tensor) -> Tensor:
        """[B, n, h] of input tokens [B, n] with these rows of `image_positions`, [n, h]."""
        return self.dropout(F.embedding(inputs, self.word) + positions)

    def shifted(self, image: Tensor) -> Tensor:
        """Inputs [B, F*N] of tokens [B, F, N]: begin-of-image, then all but a frame's last."""
        return F.pad(image[..., :-1], (1, 0), value=self.model.begin_of_image).flatten(1)

    def image_positions(self) -> Tensor:
        """[V, h], added to the words of the image slots."""
        start, size = self.model.image_position, self.model.grid.tokens_per_frame
        first = self.position[start : start + size]
        if self.frames == 1:
            return first
        return torch.cat([first, self.frame_position[: (self.frames - 1) * size]])


def text_positions(text_length: Tensor, slots: int) -> Tensor:
    """int64 [B, slots]: 0 for the padding on the left, then 0, 1, 2, ... for real text."""
    slot = torch.arange(slots, device=text_length.device)
    return (slot - (slots - text_length[:, None])).clamp(min=0)
