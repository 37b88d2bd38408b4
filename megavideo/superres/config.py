"""Sizes of the super-resolution models; the defaults are those of CogView2's published ones."""

from typing import Literal

from pydantic import Field, model_validator

from megavideo.config.schema import Count, Natural, Positive, Section


class SuperResolutionConfig(Section):
    """What both models have: CogView2's transformer and a grid of fine tokens."""

    hidden: Count = Field(3072, description="width h of the residual stream")
    heads: Count = Field(48, description="attention heads; each has hidden / heads units")
    layers: Count = Field(48, description="transformer layers")
    fine_side: Count = Field(60, description="tokens per row and column of an enlarged frame")
    vocab_size: Count = Field(150_010, description="rows of the word embedding")
    image_codes: Count = Field(20_000, description="image-codebook size; ids [0, image_codes)")
    begin_of_image: Natural = Field(150_000, description="token id of fine slots not yet known")
    position_rows: Count = Field(1024, description="rows of the base position table")
    norm_eps: Positive = Field(1e-5, description="epsilon of every LayerNorm")
    window: Count = Field(
        5,
        description="columns of the window of fine tokens around a fine one; it has 2n-1 rows",
    )

    @property
    def fine_tokens(self) -> int:
        """Tokens of an enlarged frame."""
        return self.fine_side * self.fine_side

    @model_validator(mode="after")
    def _sizes_fit(self) -> "SuperResolutionConfig":
        if self.hidden % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden={self.hidden}")
        for name in ("begin_of_image", "image_codes"):
            if getattr(self, name) >= self.vocab_size:
                raise ValueError(
                    f"{name}={getattr(self, name)} is outside the vocabulary; it must be below "
                    f"vocab_size={self.vocab_size}"
                )
        return self


class DirectConfig(SuperResolutionConfig):
    """Direct super-resolution: a frame of coarse tokens becomes all fine tokens at once."""

    kind: Literal["direct"] = "direct"
    text_slots: Count = Field(96, description="text positions, left-padded")
    coarse_side: Count = Field(20, description="tokens per row and column of a frame")
    coarse_position: Natural = Field(513, description="base position of a frame's first token")
    coarse_window: Count = Field(
        5, description="side of the window of coarse tokens that a fine token sees"
    )

    @property
    def coarse_tokens(self) -> int:
        """Tokens of a frame before it is enlarged."""
        return self.coarse_side * self.coarse_side

    @property
    def factor(self) -> int:
        """Fine tokens per coarse token and axis."""
        return self.fine_side // self.coarse_side

    @model_validator(mode="after")
    def _grids_fit(self) -> "DirectConfig":
        if self.fine_side % self.coarse_side:
            raise ValueError(
                f"fine_side={self.fine_side} is not a multiple of coarse_side={self.coarse_side}"
            )
        if self.text_slots > self.coarse_position:
            raise ValueError(
                f"text_slots={self.text_slots} overlaps coarse_position={self.coarse_position}; "
                f"use at most {self.coarse_position} text slots"
            )
        needed = self.coarse_position + self.coarse_tokens
        if self.position_rows < needed:
            raise ValueError(
                f"position_rows={self.position_rows} cannot hold {self.coarse_tokens} coarse "
                f"tokens from position {self.coarse_position}; the base needs at least {needed}"
            )
        return self


class IterativeConfig(SuperResolutionConfig):
    """Iterative super-resolution: fine tokens are partly masked and predicted anew, six times."""

    kind: Literal["iterative"] = "iterative"
    text_slots: Count = Field(16, description="text positions, left-padded")
