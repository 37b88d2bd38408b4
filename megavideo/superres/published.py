"""CogView2's published super-resolution checkpoints: their names, and what sizes they imply."""

from collections.abc import Mapping
from typing import TypeVar

from megavideo.checkpoint.formats.sat import canonical_name

Value = TypeVar("Value")


def canonical_tensors(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """`tensors` of a published checkpoint by our names.

    Raises: ValueError if one is none of CogView2's.
    """
    return {superres_name(canonical_name(name)): tensor for name, tensor in tensors.items()}


def superres_name(video_name: str) -> str:
    """Our name here of what a text-to-video model calls `video_name`.

    SAT calls the extra channel and positions alike in both; in video they are those of time.
    """
    name = video_name.replace(".attention.temporal.", ".attention.fine.")
    return name.replace("embedding.frame_position", "embedding.fine_position")
