"""The token grid of one sample: text slots, then frames of side x side image tokens.

T text slots, F frames, R side, N = R*R tokens per frame, V = F*N image tokens, S = T+V.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Sizes of a sample; an image token `i` in [0, V) is frame `i // N`, raster index `i % N`."""

    text: int
    frames: int
    side: int

    @property
    def tokens_per_frame(self) -> int:
        """N."""
        return self.side * self.side

    @property
    def image_tokens(self) -> int:
        """V."""
        return self.frames * self.tokens_per_frame

    @property
    def sequence(self) -> int:
        """S."""
        return self.text + self.image_tokens
