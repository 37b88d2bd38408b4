"""From a batch to the loss of each frame: what training minimises and evaluation reports."""

from typing import Any, Protocol

import torch
from torch import Tensor

from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.layout.rules import loss_frames
from megavideo.model.build import stage_grid
from megavideo.model.head import frame_losses
from megavideo.parallel.mesh import SINGLE, Mesh


class Batch(Protocol):
    """Samples: text int64 [B, T], text_length int64 [B], image int64 [B, F, N]."""

    @property
    def text(self) -> Tensor: ...
    @property
    def text_length(self) -> Tensor: ...
    @property
    def image(self) -> Tensor: ...


class Objective:
    """Cross-entropy of each frame that carries loss; the loss of a batch is their mean.

    Args:
        mesh: that the model was built for.
    """

    def __init__(
        self,
        model: ModelConfig,
        recipe: RecipeConfig,
        device: torch.device,
        mesh: Mesh = SINGLE,
    ):
        self._tp = mesh.tp
        self.frames = loss_frames(recipe.stage, stage_grid(model, recipe.stage).frames)
        self._device = device

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Mean loss of each of `frames`, float32 [loss frames]."""
        text, text_length, image = self.inputs(batch)
        return self.losses(model((text, text_length, image)), image)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer takes, on the device; the image is also the last one's labels."""
        text, text_length, image = (
            part.to(self._device, non_blocking=True)
            for part in (batch.text, batch.text_length, batch.image)
        )
        return text, text_length, image

    def losses(self, logits: Tensor, image: Tensor) -> Tensor:
        """Mean loss of each of `frames`, from the model's output."""
        return frame_losses(logits, image, self.frames, self._tp)
