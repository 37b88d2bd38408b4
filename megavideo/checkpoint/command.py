"""`megavideo checkpoint inspect|verify|diff|prune`: what a folder holds, and whether it is well."""

import json
import sys
from collections.abc import Collection
from pathlib import Path

import click

from megavideo.checkpoint.commit import condemned, list_checkpoints, prune
from megavideo.checkpoint.describe import describe, differences
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.interface import Reader, Source, check_whole
from megavideo.checkpoint.formats.run import RunReader
from megavideo.log import progress

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.group()
def main() -> None:
    """Inspect, verify, compare and remove checkpoints.

    `prune` takes runs, the others any format that `megavideo convert` reads.

    \b
    Example:
      megavideo checkpoint inspect runs/stage1
      megavideo checkpoint verify runs/stage1 weights
      megavideo checkpoint diff runs/stage1/checkpoints/step-00001000 runs/stage1
      megavideo checkpoint prune runs/stage1 --keep-last 3 --keep-every 10000 --dry-run
    """


@main.command()
@click.argument("paths", type=FOLDER, nargs=-1, required=True, metavar="PATH...")
@click.option("--config", "with_config", is_flag=True, help="Print a run's configuration too.")
def inspect(paths: tuple[Path, ...], with_config: bool) -> None:
    """Print what each PATH holds: stage, progress, parameters by part, sizes, frozen base."""
    for path in paths:
        reader = open_checkpoint(path)
        click.echo("\n".join(describe(reader)))
        if with_config and reader.training is not None:
            click.echo(json.dumps(reader.training.config, indent=2, ensure_ascii=False))


@main.command()
@click.argument("paths", type=FOLDER, nargs=-1, required=True, metavar="PATH...")
def verify(paths: tuple[Path, ...]) -> None:
    """Read every tensor of each PATH, and of every checkpoint of a run, and check it.

    Our formats have a digest for each tensor. SAT's files have the checksums of a zip archive, and
    Hugging Face's layout has neither: of that, names, shapes and sizes are checked.

    Exits with 1 if anything is damaged.
    """
    damaged = 0
    bases: dict[Path, str | None] = {}
    for path in [found for given in paths for found in list_checkpoints(given) or [given]]:
        try:
            count = _verify(path, bases)
        except (ValueError, OSError) as error:
            damaged += 1
            click.echo(f"{path}: DAMAGED: {error}")
        else:
            click.echo(f"{path}: whole, {count} tensors")
    if damaged:
        sys.exit(1)


@main.command()
@click.argument("first", type=FOLDER)
@click.argument("second", type=FOLDER)
def diff(first: Path, second: Path) -> None:
    """Print in which tensors FIRST and SECOND differ, and by how much.

    Exits with 1 if they differ. Formats and cuts do not count, types of values do.
    """
    a, b = open_checkpoint(first), open_checkpoint(second)
    count = 0
    for difference in differences(a, b):
        count += 1
        click.echo(f"{difference.name}: {difference.what}")
    click.echo(f"{count} of {len(a.tensors.keys() | b.tensors.keys())} tensors differ")
    if count:
        sys.exit(1)


@main.command("prune")
@click.argument("run", type=FOLDER)
@click.option("--keep-last", type=click.IntRange(min=1), required=True, help="Newest to keep.")
@click.option(
    "--keep-every",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Keep those whose step is a multiple of this too; 0 keeps no more.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be removed.")
def prune_command(run: Path, keep_last: int, keep_every: int, dry_run: bool) -> None:
    """Remove old checkpoints of RUN; never the one that `latest` names."""
    if not list_checkpoints(run):
        raise ValueError(f"{run} is no run with checkpoints")
    for folder in condemned(run, keep_last, keep_every):
        click.echo(f"{'would remove' if dry_run else 'removing'} {folder}")
    if not dry_run:
        prune(run, keep_last, keep_every)


def _verify(path: Path, bases: dict[Path, str | None]) -> int:
    """Read everything; the number of tensors.

    Args:
        bases: what is wrong with those that were read before, or None. A run's checkpoints share
            one, which is most of their bytes: it is read once.
    """
    reader = _open_exactly(path)
    check_whole(reader)
    reader.verify_files()
    base = reader.frozen if isinstance(reader, RunReader) else None
    if base is None:
        _read(reader, reader.tensors, path.name)
    else:
        if base.path not in bases:
            bases[base.path] = _problem(base)
        if problem := bases[base.path]:
            raise ValueError(problem)
        _read(reader, reader.tensors.keys() - base.tensors.keys(), path.name)
    return len(reader.tensors)


def _problem(base: Source) -> str | None:
    """Read all of `base`: what is wrong with it."""
    try:
        _read(base, base.tensors, f"base {base.path.name}")
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _read(source: Source, names: Collection[str], title: str) -> None:
    with progress(f"verifying {title}", len(names)) as advance:
        for name in names:
            source.read(name)
            advance()


def _open_exactly(path: Path) -> Reader:
    """The checkpoint at `path` itself, also where an older one of the run would be whole."""
    return RunReader(path) if path.name.startswith("step-") else open_checkpoint(path)


if __name__ == "__main__":
    main()
