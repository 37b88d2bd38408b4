"""Generated videos beside real clips with the same caption, and how a classifier judges them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL.Image import Image

from megavideo.data.captions import read_captions
from megavideo.data.pictures import contact_sheet
from megavideo.data.video import read_clip
from megavideo.generate.output import finished_videos

SHOWN = 9  # frames of each video, evenly spread from its first to its last


def draw_generated(folder: Path, captions: Path) -> Image:
    """A contact sheet of the videos in `folder`, each under the real clip of its caption.

    Args:
        captions: table of real clips; paths in it start from its folder.

    Raises: ValueError if `folder` holds no finished video.
    """
    videos = finished_videos(folder)
    if not videos:
        raise ValueError(f"{folder} holds no finished video of `megavideo generate`")
    clips = {row.text: captions.parent / row.video for row in reversed(read_captions(captions))}
    rows: list[list[np.ndarray]] = []
    labels: list[str] = []
    for video in videos:
        made = read_clip(video.folder / "video.mp4", video.fps).frames
        if video.prompt in clips:
            size, seconds = made.shape[1], len(made) / video.fps
            real = read_clip(clips[video.prompt], video.fps, size, seconds).frames
            rows.append(_spread(real))
            labels.append(f"{video.prompt} (real)")
        rows.append(_spread(made))
        labels.append(f"{video.prompt} (generated)")
    return contact_sheet(rows, labels, scale=max(1, 128 // rows[-1][0].shape[0]))


def judgement(scores: Path) -> Sequence[Sequence[str]]:
    """Rows of a table from what `megavideo score-clips --json` wrote."""
    return [
        [
            row["attribute"],
            str(row["clips"]),
            *(f"{row[share]:.0%}" for share in ("generated", "real", "chance")),
        ]
        for row in json.loads(scores.read_text())
    ]


def _spread(frames: np.ndarray) -> list[np.ndarray]:
    places = np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)
    return list(frames[places])
