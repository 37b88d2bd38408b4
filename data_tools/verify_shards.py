"""`megavideo verify-shards`: read every sample and check it in every way there is."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np

from megavideo.data.index import ClipIndex, open_index, open_text_tokenizer
from megavideo.data.shards import file_sha256, list_shards
from megavideo.data.source import LocalShards, ShardReader
from megavideo.data.stream import read_clip
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.log import progress


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--text-tokenizer",
    type=click.Path(path_type=Path),
    help="Also check that it is the one that made the text, and every text id against it.",
)
def main(folders: tuple[Path, ...], text_tokenizer: Path | None) -> None:
    """Check all samples in FOLDERS: SHA-256 of every shard, and of every sample its CRC-32, sizes,
    token ranges and text.

    Prints what is damaged, and ends with status 1 if anything is.

    \b
    Example:
      megavideo verify-shards tokens/train tokens/validation --text-tokenizer text.model
    """
    problems: list[str] = []
    for folder in folders:
        started = time.monotonic()
        index = open_index(folder)
        tokenizer = open_text_tokenizer(text_tokenizer, index) if text_tokenizer else None
        with progress(f"verifying {folder}", total=len(index)) as advance:
            found = list(_problems(index, tokenizer, advance))
        for problem in found:
            click.echo(problem)
        size = sum(shard.bytes for shard in index.shards)
        click.echo(
            f"{folder}: {len(index)} clips in {len(index.shards)} shards, {size / 1e6:.1f} MB in "
            f"{time.monotonic() - started:.1f} s: {f'{len(found)} problems' if found else 'whole'}"
        )
        problems += found
    if problems:
        raise SystemExit(1)


def _problems(
    index: ClipIndex, tokenizer: TextTokenizer | None, advance: Callable[..., None]
) -> Iterator[str]:
    """A line for everything that is wrong."""
    listed = {shard.file for shard in index.shards}
    for path in list_shards(index.folder):
        if path.name not in listed:
            yield f"{path}: is not in the index; run `megavideo build-index {index.folder}`"
    reader = ShardReader(LocalShards(index.folder, index.shards), retries=0)
    for number, shard in enumerate(index.shards):
        path = index.folder / shard.file
        rows = np.flatnonzero(index.columns["shard"] == number)
        if not path.is_file():
            yield f"{path}: is missing, with {len(rows)} samples"
            advance(len(rows))
            continue
        if (digest := file_sha256(path)) != shard.sha256:
            yield f"{path}: has SHA-256 {digest}, the index says {shard.sha256}"
        for sample in rows.tolist():
            if problem := _sample_problem(index, reader, sample, tokenizer):
                yield f"{path}: {problem}"
            advance()


def _sample_problem(
    index: ClipIndex, reader: ShardReader, sample: int, tokenizer: TextTokenizer | None
) -> str | None:
    try:
        clip = read_clip(index, reader, sample)
        if clip.text.min() < index.making.image_codes:
            raise ValueError(f"text id {clip.text.min()} is an image code")
        if tokenizer and tokenizer.encode(clip.caption) != clip.text.tolist():
            raise ValueError("the text ids are not those of its caption")
    except ValueError as error:
        return f"sample {index.key(sample)} at byte {index[sample].offset}: {error}"
    return None


if __name__ == "__main__":
    main()
