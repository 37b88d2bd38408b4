"""States to the loss: logits of loss-carrying frames over image codes, and their cross-entropy."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.config.schema import ModelConfig
from megavideo.model.layers import LayerNorm, Streams
from megavideo.parallel.collectives import gather_slots
from megavideo.parallel.linear import first_rows
from megavideo.parallel.loss import cross_entropy
from megavideo.parallel.mesh import Axis
from megavideo.parallel.part import Part
from megavideo.parallel.region import Region
from megavideo.parallel.shard import Shard


class TiedRows(nn.Module):
    """The image rows of the embedding's own table, for a head that lies beside the embedding."""

    def __init__(self, word: nn.Parameter, codes: int, axis: Axis):
        super().__init__()
        self.word = word
        self.codes = codes
        self.axis = axis

    def forward(self) -> Tensor:
        """[columns, h]: this rank's even part of the image rows."""
        return first_rows(self.word, self.codes, self.axis)


class CopiedRows(nn.Module):
    """A copy of the embedding's image rows, for a head that lies elsewhere or is cut otherwise.

    It is no parameter: it belongs to no checkpoint, and whoever fills `embedding.word` fills it too
    (see places.py). The word table must be frozen.
    """

    rows: Tensor

    def __init__(self, model: ModelConfig, axis: Axis):
        super().__init__()
        self.table = (model.vocab_size, model.hidden)
        self.part = Part(
            (model.image_codes, model.hidden), Shard(dim=0, padded=True), axis.rank, axis.size
        )
        self.register_buffer("rows", torch.empty(self.part.held), persistent=False)

    def forward(self) -> Tensor:
        """[columns, h]: this rank's even part of the image rows."""
        return self.rows


class Head(nn.Module):
    """Final LayerNorm, then the word embedding's image rows as a tied output matrix without bias.

    The published code computes all 150,010 columns at all 2,064 slots and slices afterwards; only
    image columns at loss-carrying slots ever reach the loss, so only those are computed. Over
    tensor-parallel ranks these columns are cut evenly, whichever rank embeds them.

    Args:
        rows: gives the image rows, the output matrix.
        frames: frames that carry loss.
    """

    name = "head"

    def __init__(
        self,
        rows: TiedRows | CopiedRows,
        model: ModelConfig,
        frames: Sequence[int],
        region: Region,
    ):
        super().__init__()
        self.norm = LayerNorm(model.hidden, model.norm_eps, region)
        self.rows = rows
        self.codes = model.image_codes
        self.num_columns = -(-model.image_codes // region.axis.size)
        self.per_frame = model.grid.tokens_per_frame
        self.frames = list(frames)
        self.region = region

    def forward(self, streams: Streams) -> Tensor:
        """Logits [B, loss frames, N, columns], in float32 or wider (see `columns`)."""
        _, image, _ = streams
        (states,), _ = self.region.enter([self.norm(image)])
        return self.columns(states.unflatten(1, (-1, self.per_frame))[:, self.frames])

    def logits(self, states: Tensor, rows: Tensor) -> Tensor:
        """Logits [B, codes], whole on every rank, of states [B, h] of any slots.

        Args:
            rows: what `self.rows()` gave: a caller of many steps asks once, since it may be sent
                over ranks.
        """
        logits = self._of_rows(self.norm(states), rows)
        if self.region.axis.size > 1:
            (logits,), _ = gather_slots([logits], (), self.region.axis)
        return logits[:, : self.codes]

    def columns(self, normed: Tensor) -> Tensor:
        """Logits [..., columns] of normed states [..., h], in float32 or wider.

        Columns are this rank's image codes. Where codes do not divide, the last ranks' missing
        columns are -inf.
        """
        return self._of_rows(normed, self.rows())

    def _of_rows(self, normed: Tensor, rows: Tensor) -> Tensor:
        logits = F.linear(normed, rows)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        missing = self.num_columns - logits.shape[-1]
        return F.pad(logits, (0, missing), value=-torch.inf) if missing else logits


def frame_losses(
    logits: Tensor, image: Tensor, frames: Sequence[int], axis: Axis | None = None
) -> Tensor:
    """Mean cross-entropy of each loss frame, [loss frames]; the loss of a batch is their mean.

    Args:
        logits: [B, loss frames, N, columns], the head's.
        image: int64 [B, F, N], the sample's tokens; `frames` says which of them carry loss.
        axis: the ranks that columns are cut over.
    """
    labels = image[:, list(frames)]
    losses = cross_entropy(logits.flatten(0, -2), labels.flatten(), axis or Axis())
    return losses.view(labels.shape).mean(dim=(0, 2))
