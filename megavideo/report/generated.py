"""Generated videos beside real clips with the same caption, and how a classifier judges them."""

import json
from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from megavideo.data.captions import read_captions
from megavideo.data.image_tokenizer import ImageTokenizer
from megavideo.data.pictures import contact_sheet
from megavideo.data.video import read_clip
from megavideo.generate.output import FinishedVideo, finished_videos

SHOWN = 9  # frames of each video, evenly spread from its first to its last


def draw_generated(folder: Path, captions: Path, tokenizer: ImageTokenizer | None) -> Image:
    """A contact sheet of the videos in `folder`, each under the real clip of its caption.

    Args:
        captions: table of real clips; paths in it start from its folder.
        tokenizer: decodes what enlarged frames were before, a row more; None leaves it out.

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
            rows.append(list(_spread(real)))
            labels.append(f"{video.prompt} (real)")
        if tokenizer is not None and video.enlarged:
            rows.append(_before(video, tokenizer, made.shape[1]))
            labels.append(f"{video.prompt} (generated)")
        rows.append(list(_spread(made)))
        how = "generated, then enlarged" if video.enlarged else "generated"
        labels.append(f"{video.prompt} ({how})")
    return contact_sheet(rows, labels, scale=max(1, 128 // rows[-1][0].shape[0]))


def enlarging(superres: Path) -> str:
    """A sentence from what `megavideo train-superres --json` wrote."""
    score = json.loads(superres.read_text())
    return (
        f"Super-resolution says {score['accuracy']:.1%} of the fine tokens of {score['frames']} "
        f"held-out frames right; always saying the commonest code is right for "
        f"{score['commonest']:.1%}."
    )


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


def _before(video: FinishedVideo, tokenizer: ImageTokenizer, size: int) -> list[np.ndarray]:
    """Frames before super-resolution, each pixel a square, as large as after it."""
    tokens = torch.from_numpy(_spread(np.load(video.folder / "tokens.npy")).astype(np.int64))
    side = isqrt(tokens.shape[1])
    frames = tokenizer.decode_frames(tokens.unflatten(1, (side, side)))
    return list(frames.repeat(size // frames.shape[1], 1).repeat(size // frames.shape[2], 2))


def _spread(frames: np.ndarray) -> np.ndarray:
    """Some of [frames, ...]."""
    return frames[np.linspace(0, len(frames) - 1, min(SHOWN, len(frames))).round().astype(int)]
