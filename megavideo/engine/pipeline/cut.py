"""What crosses from one pipeline stage to the next: both streams in one tensor.

DeepSpeed wants a gradient for every float tensor that it sent, and frozen text has none; one tensor
for both has one, and costs one message a micro-batch. Text's part of the gradient, 3 % of the
published model's, is zeros.
"""

import torch
from torch import Tensor

from megavideo.layout.grid import Grid
from megavideo.model.layers import Streams

Packed = tuple[Tensor, Tensor]


def pack(streams: Streams) -> Packed:
    """(states [B, T + V, h], text_length int64 [B]) of the two streams."""
    text, image, text_length = streams
    return torch.cat([text, image], dim=1), text_length


def unpack(packed: Packed, grid: Grid) -> Streams:
    """The streams again, of all slots of `grid` or of an equal share of both.

    The text is cut off from its gradient: pipelines only train models whose text stream is frozen.
    """
    states, text_length = packed
    slots = states.shape[1]
    text = slots * grid.text // grid.sequence
    text_states, image_states = states.split([text, slots - text], dim=1)
    return text_states.detach(), image_states, text_length
