"""Train the VQ-VAE image tokenizer on frames of a folder of videos or images."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch

from megavideo import options
from megavideo.data.frame_pool import FramePool, load_frames
from megavideo.data.image_tokenizer import (
    RATES,
    ImageTokenizer,
    ImageTokenizerConfig,
    frames_of,
    images_of,
)
from megavideo.data.image_training import ImageTrainer, ImageTraining
from megavideo.data.pictures import contact_sheet
from megavideo.data.trainer_file import train_with_checkpoints
from megavideo.files import atomic_path

PREVIEW_FRAMES, PREVIEW_ROW = 24, 12
PREVIEW_SIDE = 128  # pixels; smaller frames are enlarged


Rgb = tuple[float, float, float]


def pixel_statistics(frames: np.ndarray) -> tuple[Rgb, Rgb]:
    """Mean and standard deviation, in [0, 1], of frames uint8 [n, H, W, 3] per RGB channel."""
    pixels = frames.reshape(-1, 3)
    mean = (pixels.mean(0) / 255).tolist()
    std = np.maximum(pixels.std(0) / 255, 0.01).tolist()  # one flat colour has none
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def write_preview(path: Path, tokenizer: ImageTokenizer, frames: np.ndarray) -> None:
    """A picture of held-out frames, each row above what it is after encoding and decoding."""
    chosen = frames[np.linspace(0, len(frames) - 1, min(len(frames), PREVIEW_FRAMES), dtype=int)]
    decoded = frames_of(tokenizer.decode(tokenizer.encode(images_of(chosen))))
    rows, labels = [], []
    for start in range(0, len(chosen), PREVIEW_ROW):
        part = slice(start, start + PREVIEW_ROW)
        rows += [list(chosen[part]), list(decoded[part])]
        labels += ["original", "decoded from tokens"]
    sheet = contact_sheet(rows, labels, scale=max(1, PREVIEW_SIDE // chosen.shape[1]))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The .safetensors file to write.",
)
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(min=8),
    multiple=True,
    default=[160],
    show_default=True,
    help="Side in pixels to which frames are scaled and cut; given again, sizes take turns.",
)
@click.option(
    "--compress-rate",
    "rates",
    type=click.Choice([str(rate) for rate in RATES]),
    multiple=True,
    default=["8"],
    show_default=True,
    help="Pixels per token and axis; given again, rates take turns, and the first is used.",
)
@click.option("--channels", default=128, show_default=True, help="Width at full resolution.")
@click.option("--z-channels", default=256, show_default=True, help="Dimension of a code.")
@click.option("--codes", default=20000, show_default=True, help="Size of the codebook.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=100_000,
    show_default=True,
    help="Optimizer steps.",
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Frames per step."
)
@click.option(
    "--crop",
    type=click.IntRange(min=8),
    help="Train the first 70% of the steps on squares of so many pixels. [default: whole frames]",
)
@options.learning_rate(3e-4)
@click.option(
    "--frames",
    "limit",
    type=click.IntRange(min=1),
    default=20_000,
    show_default=True,
    help="Frames drawn from the folder and kept in memory; of larger sizes fewer, to equal bytes.",
)
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True),
    default=8.0,
    show_default=True,
    help="Frames per second of video to draw from.",
)
@options.seed
@click.option(
    "--preview",
    type=click.Path(dir_okay=False, path_type=Path),
    help="PNG of held-out frames beside their reconstructions.",
)
@options.save_every
@options.device
@options.reading_workers
def main(
    folder: Path,
    out: Path,
    sizes: tuple[int, ...],
    rates: tuple[str, ...],
    channels: int,
    z_channels: int,
    codes: int,
    steps: int,
    batch: int,
    crop: int | None,
    learning_rate: float,
    limit: int,
    fps: float,
    seed: int,
    preview: Path | None,
    save_every: int,
    device: str,
    workers: int,
) -> None:
    """Train an image tokenizer on the videos and images below FOLDER.

    The defaults are the published model's sizes. One file in sixteen is held out and only measured.
    An interrupted run continues from OUT's checkpoint when the same command is given again.
    For super-resolution, train on both sizes of picture: one codebook then serves both.

    \b
    Example, a small one for 64-pixel clips:
      megavideo train-image-tokenizer runs/clips --out runs/image.safetensors --size 64 \\
        --channels 8 --z-channels 32 --codes 256 --steps 900 --batch 8 --crop 32 \\
        --learning-rate 4e-3 --frames 6000 --preview runs/image.png
      megavideo train-image-tokenizer clips --out image.safetensors --size 160 --size 480
    """
    started = time.monotonic()
    numbers = tuple(map(int, rates))
    config = ImageTokenizerConfig(channels, z_channels, codes, numbers, numbers[0])
    _check_pixels([*(("size", size) for size in sizes), ("crop", crop or sizes[0])], sizes, numbers)
    limits = [max(2, limit * min(sizes) ** 2 // size**2) for size in sizes]
    pools = [
        load_frames(folder, size, fps, count, seed, workers)
        for size, count in zip(sizes, limits, strict=True)
    ]
    mean, std = pixel_statistics(pools[0].train)
    trainer = ImageTrainer(
        replace(config, mean=mean, std=std),
        ImageTraining(steps, batch, learning_rate, seed, crop),
        torch.device(device),
    )
    checkpoint = out.with_name(out.name + ".checkpoint")
    train_with_checkpoints(trainer, [pool.train for pool in pools], checkpoint, save_every)
    _finish(trainer, pools[0], out, preview)
    checkpoint.unlink(missing_ok=True)
    click.echo(f"{out}: {_summary(trainer, pools)} in {time.monotonic() - started:.1f} s")


def _check_pixels(
    given: Sequence[tuple[str, int]], sizes: Sequence[int], rates: Sequence[int]
) -> None:
    """Whether every size, and the crop, is a whole number of tokens at every rate."""
    for name, pixels in given:
        for rate in rates:
            if pixels % rate or (name == "crop" and pixels > min(sizes)):
                raise ValueError(
                    f"--{name} {pixels} must be a multiple of --compress-rate {rate}, at most "
                    f"{min(sizes)}"
                )


def _finish(trainer: ImageTrainer, pool: FramePool, out: Path, preview: Path | None) -> None:
    trainer.model.save(out)
    if preview:
        write_preview(preview, ImageTokenizer.load(out), pool.held_out)


def _summary(trainer: ImageTrainer, pools: Sequence[FramePool]) -> str:
    scores = [
        f"{pool.held_out.shape[1]} pixels at 1/{rate}: {trainer.evaluate(pool.held_out, rate)}"
        for rate in trainer.model.config.rates
        for pool in pools
    ]
    return (
        f"trained {trainer.step} steps on {sum(len(pool.train) for pool in pools)} frames; on "
        f"{sum(len(pool.held_out) for pool in pools)} held-out frames {'; '.join(scores)}; "
        f"digest {trainer.model.digest}"
    )


if __name__ == "__main__":
    main()
