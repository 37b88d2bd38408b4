"""Train a sentencepiece text tokenizer on captions."""

import time
from collections.abc import Sequence
from pathlib import Path

import click

from megavideo.data.captions import read_captions
from megavideo.data.text_tokenizer import TextTokenizer, train_text_model
from megavideo.files import atomic_write
from megavideo.log import log


def read_texts(path: Path) -> list[str]:
    """The captions of a table, or the lines of a .txt file that are not blank."""
    if path.suffix != ".txt":
        return [caption.text for caption in read_captions(path)]
    try:
        return [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: {error}; save it as UTF-8") from error


def evenly(texts: Sequence[str], limit: int) -> Sequence[str]:
    """At most `limit` of the texts, evenly spaced."""
    if len(texts) <= limit:
        return texts
    return [texts[number * len(texts) // limit] for number in range(limit)]


@click.command()
@click.argument(
    "texts", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The .model file to write.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(min=1),
    default=16000,
    show_default=True,
    help="Pieces, of which 261 are bytes and special pieces.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=2_000_000,
    show_default=True,
    help="Train on at most so many texts, evenly spaced over the files.",
)
def main(texts: tuple[Path, ...], out: Path, vocab_size: int, limit: int) -> None:
    """Train a text tokenizer on TEXTS: captions tables (.csv, .jsonl, .parquet) or .txt files.

    The result encodes any text: a character it has never seen becomes bytes. The same texts always
    give the same file.

    \b
    Example:
      megavideo train-text-tokenizer runs/clips/captions.csv --vocab-size 400 --out runs/text.model
    """
    started = time.monotonic()
    everything = [text for path in texts for text in read_texts(path)]
    chosen = evenly(everything, limit)
    log.info("training %d pieces on %d of %d texts", vocab_size, len(chosen), len(everything))
    with atomic_write(out) as file:
        file.write(train_text_model(chosen, vocab_size))
    tokenizer = TextTokenizer(out)
    sample = evenly(everything, 10_000)
    tokens = sum(len(tokenizer.encode(text)) for text in sample) / len(sample)
    click.echo(
        f"trained {tokenizer.num_pieces} pieces on {len(chosen)} texts, {tokens:.1f} tokens a "
        f"text, digest {tokenizer.digest}: {out} in {time.monotonic() - started:.1f} s"
    )


if __name__ == "__main__":
    main()
