"""Clips of a folder, all of the same length and size, for networks that look at video."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from megavideo.data.video import VIDEO_SUFFIXES, read_frames
from megavideo.log import log, progress


@dataclass(frozen=True)
class Cut:
    """The first `frames` frames at `fps` a second, the middle square scaled to `side` pixels."""

    frames: int
    fps: float
    side: int


def read_clips(folder: Path, cut: Cut, limit: int | None = None) -> Iterator[np.ndarray]:
    """uint8 [frames, side, side, 3] of each video below `folder`, in the order of their paths.

    Videos that are broken or too short are logged and left out.

    Raises: ValueError if `folder` holds no video, or none that can be used.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    used = 0
    with progress(f"clips of {folder.name}", total=len(paths[:limit])) as advance:
        for path in paths[:limit]:
            clip = _read(path, cut)
            advance(note=path.name)
            if clip is not None:
                used += 1
                yield clip
    if not used:
        raise ValueError(f"none of the {len(paths)} videos in {folder} can be used; see the log")


def _read(path: Path, cut: Cut) -> np.ndarray | None:
    try:
        frames = list(islice(read_frames(path, cut.fps, cut.side), cut.frames))
    except ValueError as error:
        log.warning("left out: %s", error)
        return None
    if len(frames) < cut.frames:
        log.warning(
            "left out: %s has %d frames at %g a second, fewer than %d",
            path, len(frames), cut.fps, cut.frames,
        )  # fmt: skip
        return None
    return np.stack(frames)
