"""The sizes of the model that most tests use: as small as it gets with every part of use."""

from typing import Any

from megavideo.config.schema import ModelConfig


def tiny(**sizes: Any) -> ModelConfig:
    """Three frames of 2 x 2 tokens, of 20 codes; `sizes` in place of those below."""
    standard = {
        "hidden": 16,
        "heads": 2,
        "layers": 2,
        "text_slots": 4,
        "frames": 3,
        "side": 2,
        "vocab_size": 40,
        "image_codes": 20,
        "pad": 23,
        "newline": 24,
        "begin_of_image": 39,
        "position_rows": 16,
        "image_position": 8,
        "frame_position_rows": 12,
    }
    return ModelConfig(**standard | sizes)
