"""`megavideo inspect-shards`: show what is in a folder of shards, as text and as a picture."""

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch

from megavideo.data.image_tokenizer import ImageTokenizer, frames_of
from megavideo.data.index import ClipIndex, open_index, open_text_tokenizer
from megavideo.data.pictures import contact_sheet
from megavideo.data.sample import TokenClip
from megavideo.data.source import LocalShards, ShardReader
from megavideo.data.stream import read_clip
from megavideo.files import atomic_path


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Samples to show, evenly spread.",
)
@click.option(
    "--text-tokenizer",
    type=click.Path(path_type=Path),
    help="sentencepiece model that made the text; also print what the ids say.",
)
@click.option(
    "--image-tokenizer",
    type=click.Path(path_type=Path),
    help="VQ-VAE model that made the tokens; for --png.",
)
@click.option(
    "--png", type=click.Path(path_type=Path), help="Write decoded frames of the samples here."
)
@click.option(
    "--frames",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Frames a sample in the picture.",
)
@click.option(
    "--scale",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Enlarge pixels of the picture.",
)
def main(
    folder: Path,
    count: int,
    text_tokenizer: Path | None,
    image_tokenizer: Path | None,
    png: Path | None,
    frames: int,
    scale: int,
) -> None:
    """Print samples of FOLDER and token statistics; with --png, draw the decoded tokens.

    \b
    Example:
      megavideo inspect-shards tokens/train --text-tokenizer text.model \\
          --image-tokenizer image.safetensors --png sheet.png
    """
    if (png is None) != (image_tokenizer is None):
        raise click.UsageError("--png and --image-tokenizer need each other")
    index = open_index(folder)
    tokenizer = open_text_tokenizer(text_tokenizer, index) if text_tokenizer else None
    samples = np.unique(np.linspace(0, len(index) - 1, count).round().astype(int)).tolist()
    store = LocalShards(folder, index.shards)
    store.check_sizes()
    reader = ShardReader(store, retries=0)
    clips = [read_clip(index, reader, sample) for sample in samples]
    click.echo(_summary(index))
    for sample, clip in zip(samples, clips, strict=True):
        click.echo(_describe(index, sample, clip))
        if tokenizer:
            click.echo(f"    reads as {tokenizer.decode(clip.text.tolist())!r}")
    click.echo(_code_use(clips, index.making.image_codes))
    if png is not None and image_tokenizer is not None:
        _draw(index, clips, image_tokenizer, png, frames, scale)


def _summary(index: ClipIndex) -> str:
    lengths = index.columns["n_frames"]
    making = index.making
    return (
        f"{index.folder}: {len(index)} clips in {len(index.shards)} shards; "
        f"{lengths.min()}-{lengths.max()} frames of {making.side}x{making.side} tokens "
        f"at {making.fps} fps; {making.image_codes} image codes; fingerprint {index.fingerprint}"
    )


def _describe(index: ClipIndex, sample: int, clip: TokenClip) -> str:
    row = index[sample]
    frames = clip.frames
    kept = float((frames[1:] == frames[:-1]).mean()) if len(frames) > 1 else 1.0
    return (
        f"{index.key(sample)}  {index.shards[row.shard].file} byte {row.offset}\n"
        f"    {clip.caption!r}: {len(clip.text)} text ids\n"
        f"    {len(frames)} frames, {len(frames) / clip.fps:.2f} s; "
        f"{len(np.unique(frames))} different codes, {kept:.0%} of the tokens equal the frame before"
    )


def _code_use(clips: Sequence[TokenClip], codes: int) -> str:
    """How evenly the codebook is used: perplexity is the number of codes that would be as uneven if
    used equally.
    """
    counts = np.bincount(np.concatenate([clip.frames.ravel() for clip in clips]), minlength=codes)
    share = counts[counts > 0] / counts.sum()
    perplexity = np.exp(-(share * np.log(share)).sum())
    return (
        f"in these {len(clips)} clips: {len(share)} of {codes} codes, perplexity {perplexity:.1f}, "
        f"the commonest is {share.max():.1%} of all tokens"
    )


def _draw(
    index: ClipIndex, clips: Sequence[TokenClip], path: Path, png: Path, count: int, scale: int
) -> None:
    tokenizer = ImageTokenizer.load(path)
    if tokenizer.digest != index.making.image_tokenizer:
        raise ValueError(
            f"{path} has digest {tokenizer.digest}; the tokens in {index.folder} were made by "
            f"{index.making.image_tokenizer}"
        )
    sheet = contact_sheet(
        [list(_pixels(tokenizer, clip, count)) for clip in clips],
        [clip.caption for clip in clips],
        scale,
    )
    with atomic_path(png) as temporary:
        sheet.save(temporary)
    click.echo(f"wrote {png}: {len(clips)} rows")


def _pixels(tokenizer: ImageTokenizer, clip: TokenClip, count: int) -> np.ndarray:
    """`count` decoded frames, evenly spread, uint8 [n, H, W, 3]."""
    chosen = np.unique(np.linspace(0, len(clip.frames) - 1, count).round().astype(int))
    tokens = torch.from_numpy(clip.frames[chosen].astype(np.int64))
    return frames_of(tokenizer.decode(tokens.reshape(-1, clip.side, clip.side)))


if __name__ == "__main__":
    main()
