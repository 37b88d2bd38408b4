"""Made-up samples, each a function of its global position alone, as a loader would cut them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megavideo.config.schema import ModelConfig
from megavideo.data.batch import Batch


def sample(model: ModelConfig, position: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """(text int64 [T], text_length [], image int64 [frames, N]) at `position`."""
    generator = torch.Generator().manual_seed(position)
    text = torch.randint(
        model.image_codes, model.vocab_size, (model.text_slots,), generator=generator
    )
    length = torch.randint(1, model.text_slots + 1, (), generator=generator)
    shape = (frames, model.grid.tokens_per_frame)
    return text, length, torch.randint(0, model.image_codes, shape, generator=generator)


def batch_at(model: ModelConfig, positions: range, frames: int) -> Batch:
    """The samples at `positions`."""
    samples = (sample(model, position, frames) for position in positions)
    return Batch(*(torch.stack(part) for part in zip(*samples, strict=True)))


def micro_batches(
    model: ModelConfig, frames: int, micro_batch: int, rank: int = 0, size: int = 1, start: int = 0
) -> Iterator[Batch]:
    """The endless micro-batches of data-parallel `rank` of `size`, from position `start` on."""
    while True:
        first = start + rank * micro_batch
        yield batch_at(model, range(first, first + micro_batch), frames)
        start += size * micro_batch
