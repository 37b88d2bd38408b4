"""Training data of super-resolution: frames of captioned videos, tokenised in two sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megavideo.data.batch import collate
from megavideo.data.captions import Caption
from megavideo.data.image_tokenizer import ImageTokenizer, images_of
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.data.video import read_frames
from megavideo.data.workers import map_processes
from megavideo.log import log, progress


@dataclass(frozen=True)
class Pairs:
    """Frames in both sizes: coarse uint16 [n, N], fine uint16 [n, M], and their captions' ids."""

    coarse: np.ndarray
    fine: np.ndarray
    texts: list[list[int]]

    def __len__(self) -> int:
        return len(self.coarse)

    def batch(self, rows: np.ndarray, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(text [B, T], text_length [B], coarse [B, N], fine [B, M]), all int64."""
        made = collate([self.texts[row][:slots] for row in rows], list(self.coarse[rows]), slots, 0)
        return made.text, made.text_length, made.image, torch.from_numpy(self.fine[rows]).long()


@dataclass(frozen=True)
class Reading:
    """Which frames of a video are taken, and how large: sides in pixels of both sizes.

    count: frames per video, drawn without repetition by (seed, the video's number).
    """

    coarse: int
    fine: int
    fps: float
    count: int
    seed: int


def load_pairs(
    captions: Sequence[Caption],
    videos: Path,
    reading: Reading,
    image: ImageTokenizer,
    text: TextTokenizer,
    workers: int,
) -> Pairs:
    """Pairs of every video that can be read; the others are logged and left out.

    Raises: ValueError if none can be read.
    """
    coarse, fine, texts = [], [], []
    files = [(number, videos / caption.video) for number, caption in enumerate(captions)]
    with progress("tokenising pairs", total=len(files)) as advance:
        found = map_processes(partial(_frames_of, reading=reading), files, workers, chunk=4)
        for caption, frames in zip(captions, found, strict=True):
            if isinstance(frames, str):
                log.warning("skipping %s", frames)
            else:
                coarse.append(_tokens(image, frames[0]))
                fine.append(_tokens(image, frames[1]))
                texts += [text.encode(caption.text)] * len(frames[0])
            advance(note=caption.video)
    if not texts:
        raise ValueError(f"none of the {len(files)} videos in {videos} can be read")
    return Pairs(np.concatenate(coarse), np.concatenate(fine), texts)


def _frames_of(file: tuple[int, Path], reading: Reading) -> tuple[np.ndarray, np.ndarray] | str:
    """Some frames of a video in both sizes, uint8 [k, side, side, 3]; or why it is unreadable."""
    number, path = file
    try:
        coarse, fine = (
            np.stack(list(read_frames(path, reading.fps, side)))
            for side in (reading.coarse, reading.fine)
        )
    except ValueError as error:
        return str(error)
    rng = np.random.default_rng([reading.seed, number])
    chosen = rng.permutation(len(coarse))[: reading.count]
    return coarse[chosen], fine[chosen]


def _tokens(image: ImageTokenizer, frames: np.ndarray) -> np.ndarray:
    """uint16 [k, tokens]."""
    device = image.quantize.embed.weight.device
    return image.encode(images_of(frames).to(device)).flatten(1).cpu().numpy().astype(np.uint16)
