"""The two super-resolution models: tokens of a small frame to logits of a large one's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.model.layers import LayerNorm
from megavideo.superres.config import DirectConfig, IterativeConfig, SuperResolutionConfig
from megavideo.superres.layers import (
    DirectLayer,
    Embedding,
    IterativeLayer,
    coarse_mask,
    text_mask,
)


class Head(nn.Module):
    """Final LayerNorm; the output matrix is the embedding's image rows."""

    def __init__(self, config: SuperResolutionConfig):
        super().__init__()
        self.norm = LayerNorm(config.hidden, config.norm_eps)
        self.codes = config.image_codes

    def forward(self, states: Tensor, word: Tensor) -> Tensor:
        """Logits [..., image codes] of states [..., h], in float32 or wider."""
        logits = F.linear(self.norm(states), word[: self.codes])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class DirectSuperResolution(nn.Module):
    """All fine tokens in one forward pass: slot k's logits say token k (CogView2, section 3.3).

    Text and coarse tokens pass the frozen base. Each fine slot starts as begin-of-image plus its
    position and sees fine slots around it and coarse tokens around its cell, in one softmax.
    """

    def __init__(self, config: DirectConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(DirectLayer(config) for _ in range(config.layers))
        self.head = Head(config)

    def forward(self, text: Tensor, text_length: Tensor, coarse: Tensor) -> Tensor:
        """States [B, M, h] of fine slots; `logits` makes logits of them.

        Args:
            text: int64 [B, T], left-padded; text_length: int64 [B], at least 1.
            coarse: int64 [B, N], a frame's tokens.
        """
        config = self.config
        unknown = text.new_full((len(text), config.fine_tokens), config.begin_of_image)
        fine = self.embedding.fine(unknown)
        coarse_states = torch.cat(
            [
                self.embedding.text(text, text_length),
                self.embedding.coarse(coarse, config.coarse_position),
            ],
            1,
        )
        visible = coarse_mask(text_length, config.text_slots, config.coarse_tokens)
        for layer in self.layers:
            coarse_states, fine = layer(coarse_states, fine, visible)
        return fine

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., image codes] of states [..., h]."""
        return self.head(states, self.embedding.word)


class IterativeSuperResolution(nn.Module):
    """Logits of fine tokens of which some are masked as begin-of-image (CogView2, section 3.3)."""

    def __init__(self, config: IterativeConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        self.layers = nn.ModuleList(IterativeLayer(config) for _ in range(config.layers))
        self.head = Head(config)

    def forward(self, text: Tensor, text_length: Tensor, fine: Tensor) -> Tensor:
        """States [B, M, h] of fine tokens int64 [B, M]; text as for the direct model."""
        text_states = self.embedding.text(text, text_length)
        fine_states = self.embedding.fine(fine)
        visible = text_mask(text_length, self.config.text_slots)
        for layer in self.layers:
            text_states, fine_states = layer(text_states, fine_states, text_length, visible)
        return fine_states

    def logits(self, states: Tensor) -> Tensor:
        """Logits [..., image codes] of states [..., h]."""
        return self.head(states, self.embedding.word)
