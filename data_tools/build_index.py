"""`megavideo build-index`: list every sample of a folder of shards, so that it can be read at its
place.
"""

import os
import time
from pathlib import Path

import click

from megavideo.data.index import INDEX_FILE, build_index, find_shards
from megavideo.log import progress


@click.command()
@click.argument("folders", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    show_default="all cores",
    help="Shards read at once.",
)
def main(folders: tuple[Path, ...], threads: int) -> None:
    """Write index.parquet and shards.parquet in each of FOLDERS.

    Every shard is read and checked against its .json; anything damaged stops the program with the
    shard and the byte, and an older index stays as it is. Shards that an older index has listed
    with the same SHA-256 are not parsed again.

    \b
    Example:
      megavideo build-index tokens/train tokens/validation
    """
    for folder in folders:
        started = time.monotonic()
        with progress(f"indexing {folder}", total=len(find_shards(folder))) as advance:
            index = build_index(folder, threads, advance)
        hours = float(index.columns["n_frames"].sum()) / index.making.fps / 3600
        size = sum(shard.bytes for shard in index.shards)
        click.echo(
            f"indexed {len(index)} clips ({hours:.2f} h) in {len(index.shards)} shards "
            f"({size / 1e6:.1f} MB) in {time.monotonic() - started:.1f} s: {folder / INDEX_FILE}"
        )


if __name__ == "__main__":
    main()
