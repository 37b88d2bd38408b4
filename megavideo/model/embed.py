"""Tokens to states: word plus position, each frame shifted by one behind begin-of-image."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.config.schema import ModelConfig
from megavideo.model.layers import Dropout, Streams
from megavideo.parallel.linear import embed
from megavideo.parallel.part import new_parameter
from megavideo.parallel.region import Region
from megavideo.parallel.shard import Shard


class Embedding(nn.Module):
    """Word table, base positions (text and first frame), trainable positions of later frames.

    Positions are looked up by slot (docs/model.md 2): padding has position 0, real text 0..k-1,
    the first frame `image_position`.., and later frames their own table.
    """

    name = "embedding"

    def __init__(self, model: ModelConfig, frames: int, dropout: float, region: Region):
        super().__init__()
        self.model = model
        self.frames = frames
        self.region = region
        hidden = model.hidden
        self.word = new_parameter(
            (model.vocab_size, hidden), Shard(dim=0, padded=True), region.axis
        )
        self.position = new_parameter((model.position_rows, hidden))
        if frames > 1:
            self.frame_position = new_parameter((model.frame_position_rows, hidden))
        self.dropout = Dropout(dropout, region)

    def forward(self, batch: Streams) -> Streams:
        """(text int64 [B,T], text_length [B], image int64 [B,F,N]) -> the two streams."""
        text, text_length, image = batch
        inputs = self.shifted(image)
        return (*self.states(text, text_length, inputs, self.image_positions()), text_length)

    def states(
        self, text: Tensor, text_length: Tensor, inputs: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """States [B, T, h] of left-padded text, and [B, n, h] of image inputs.

        Args:
            inputs: input tokens [B, n].
            positions: their rows of `image_positions`, [n, h].
        """
        axis = self.region.axis
        words = self.region.leave([embed(ids, self.word, axis) for ids in (text, inputs)])
        of_text = F.embedding(text_positions(text_length, text.shape[1]), self.position)
        text_states, image_states = (
            self.dropout(word + self.region.outside(position))
            for word, position in zip(words, (of_text, positions[None]), strict=True)
        )
        return text_states, image_states

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
