"""Still frames for training an image tokenizer, drawn from a folder of videos and images."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from megavideo.data.video import VIDEO_SUFFIXES, read_frames
from megavideo.data.workers import map_processes
from megavideo.log import log, progress

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
HELD_OUT = 16  # one file in so many is for measuring only
FILES_PER_TASK = 8


@dataclass(frozen=True)
class FramePool:
    """Frames uint8 [n, size, size, 3]; `held_out` come from files that `train` has nothing of."""

    train: np.ndarray
    held_out: np.ndarray


def load_frames(
    folder: Path, size: int, fps: float, limit: int, seed: int, workers: int
) -> FramePool:
    """Draw about `limit` frames, equally many from each file; they take limit * size^2 * 3 bytes.

    Files that cannot be read are logged and skipped. With more files than `limit`, `limit` files
    drawn by `seed` give a frame each.

    Raises: ValueError if fewer than two files can be read.
    """
    paths = _draw_files(folder, limit, seed)
    work = partial(_frames_of, size=size, fps=fps, count=-(-limit // len(paths)), seed=seed)
    found: list[np.ndarray] = []
    with progress("reading frames", total=len(paths)) as advance:
        for path, result in zip(
            paths,
            map_processes(work, list(enumerate(paths)), workers, FILES_PER_TASK),
            strict=True,
        ):
            if isinstance(result, str):
                log.warning("skipping %s", result)
            else:
                found.append(result)
            advance(note=path.name)
    if len(found) < 2:
        raise ValueError(f"{folder}: {len(found)} of {len(paths)} files can be read; need two")
    log.info(
        "read %d frames of %d files, skipped %d files",
        sum(map(len, found)),
        len(found),
        len(paths) - len(found),
    )
    return FramePool(np.concatenate(_but_every(found)), np.concatenate(found[::HELD_OUT]))


def _but_every(found: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [frames for number, frames in enumerate(found) if number % HELD_OUT]


def _draw_files(folder: Path, limit: int, seed: int) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    suffixes = {*VIDEO_SUFFIXES, *IMAGE_SUFFIXES}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        raise ValueError(f"{folder} holds no video or image ({', '.join(sorted(suffixes))})")
    order = np.random.default_rng(seed).permutation(len(paths))
    return [paths[number] for number in order[:limit]]


def _frames_of(
    file: tuple[int, Path], size: int, fps: float, count: int, seed: int
) -> np.ndarray | str:
    """Up to `count` frames of one file, drawn without repetition; why not, if it is unreadable."""
    number, path = file
    rng = np.random.default_rng([seed, number])
    kept: list[np.ndarray] = []
    try:
        for place, frame in enumerate(read_frames(path, fps, size)):
            if place < count:
                kept.append(frame)
            elif (slot := rng.integers(place + 1)) < count:  # reservoir: all equally likely
                kept[slot] = frame
    except ValueError as error:
        return str(error)
    return np.stack(kept)
