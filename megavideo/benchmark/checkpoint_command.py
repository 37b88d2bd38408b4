"""`megavideo benchmark checkpoint`: saving and loading beside a plain copy of the same bytes."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import click
import torch

from megavideo.benchmark.harness import environment
from megavideo.benchmark.results import Row, bars, conditions, table, write_results
from megavideo.benchmark.step_command import ALWAYS, UNUSED
from megavideo.checkpoint.commit import list_checkpoints
from megavideo.checkpoint.formats.run import RunReader
from megavideo.config.command import config_arguments
from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.engine.build import build_engine
from megavideo.engine.engine import Engine
from megavideo.engine.errors import RunFailed
from megavideo.engine.snapshot import Saved, Saver
from megavideo.engine.world import World, join_world

MIB = 1 << 20
DATA = "made-up data"
COLUMNS = ["what", "seconds", "MiB/s", "rate over plain copy's"]


@click.command()
@config_arguments
@click.option(
    "--output", required=True, type=click.Path(path_type=Path),
    help="Folder for results; checkpoints are written into it and removed: it chooses the disk.",
)  # fmt: skip
@click.option(
    "--rounds", default=3, show_default=True, type=click.IntRange(1),
    help="Saves, loads and copies of each; figures are medians.",
)  # fmt: skip
def main(files: tuple[str, ...], assignments: tuple[str, ...], output: Path, rounds: int) -> None:
    """Measure a checkpoint of a configuration: seconds lost to a save, writing, loading, copying.

    All ranks save and load as in training, in one process or under torchrun; rank 0 then copies the
    same files, with an fsync, so that the disk's own speed stands beside. Each round does all of
    them in turn. Files are dropped from the page cache before they are read. Writes
    checkpoint.json, checkpoint.md and checkpoint.png.

    \b
    Example:
      megavideo benchmark checkpoint configs/model/demo.yaml configs/recipe/demo-stage1.yaml \\
          configs/parallel/laptop.yaml --output runs/benchmark
    """
    config = load_config(files, [*UNUSED, *assignments, *ALWAYS])
    world = join_world(config.run.timeout_minutes, config.parallel)
    folder = world.from_rank_zero(lambda: _folder(output))
    try:
        run = config.run.model_copy(update={"directory": f"{folder}/run", "keep_last": 1})
        rows = measure(config.model_copy(update={"run": run}), world, rounds)
    finally:
        if world.rank == 0:
            shutil.rmtree(folder)
    if world.rank == 0:
        text = _page(rows)
        names, rates = [row["subject"] for row in rows], [row["mib_per_s"] for row in rows]
        figure = bars(names, {"rate": rates}, "MiB a second", "Checkpoint")
        write_results(output, "checkpoint", rows, text, figure)
        click.echo(text, nl=False)
    torch.distributed.destroy_process_group()


def _folder(output: Path) -> str:
    output.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix="checkpoint-", dir=output)


def measure(config: Config, world: World, rounds: int) -> list[Row]:
    """A row for the save, its stall, the load and the plain copy, each a median.

    Raises:
        RunFailed: if a checkpoint could not be written.
    """
    engine = build_engine(config, world, DATA)
    saver = Saver(engine, config, DATA)
    saved, loads, copies = [], [], []
    for number in range(rounds):
        engine.progress = replace(engine.progress, step=number + 1)
        saved.append(save_once(saver))
        checkpoint = list_checkpoints(Path(config.run.directory))[0]
        loads.append(_timed(world, checkpoint, partial(_load, engine, checkpoint)))
        copies.append(_timed(world, checkpoint, partial(_copy, world, checkpoint)))
    size = sum(file.stat().st_size for file in checkpoint.iterdir()) / MIB
    plain = median(copies)
    seconds = {
        "training lost to a save": median(max(world.gathered(s.stall_s)) for s in saved),
        "writing beside training": median(s.write_s for s in saved),
        "loading, cold": median(loads),
        "plain copy with fsync, cold": plain,
    }
    context = environment(world.device) | {"processes": world.size, "mib": size, "rounds": rounds}
    settings = config.model_dump(mode="json", include={"model", "recipe", "parallel"})
    return [
        {"subject": name, "seconds": s, "mib_per_s": size / s, "times_copy": plain / s}
        | {**context, "config": settings}
        for name, s in seconds.items()
    ]


def save_once(saver: Saver) -> Saved:
    """Save, and wait as training does: between steps.

    Raises:
        RunFailed: if it could not be written.
    """
    saver.save()
    while (saved := saver.poll()) is None:
        time.sleep(0.005)
    if saved.problem is not None:
        raise RunFailed(saved.problem)
    return saved


def _timed(world: World, checkpoint: Path, work: Callable[[], object]) -> float:
    """Seconds until all ranks have done `work` on files that are not in the page cache."""
    if world.rank == 0:
        drop_from_cache(checkpoint.iterdir())
    world.any(False)
    started = time.perf_counter()
    work()
    world.any(False)
    return time.perf_counter() - started


def drop_from_cache(files: Iterable[Path]) -> None:
    """Make the kernel forget the files' pages, so that they are read from the disk."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _load(engine: Engine, checkpoint: Path) -> None:
    engine.state.restore(RunReader(checkpoint), engine.progress.updates)


def _copy(world: World, checkpoint: Path) -> None:
    if world.rank:
        return
    target = checkpoint.parent / f".copy-of-{checkpoint.name}"
    target.mkdir()
    for file in checkpoint.iterdir():
        shutil.copyfile(file, target / file.name)
        descriptor = os.open(target / file.name, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
    shutil.rmtree(target)


def _page(rows: list[Row]) -> str:
    lines = [
        [
            row["subject"],
            f"{row['seconds']:.4g}",
            f"{row['mib_per_s']:,.0f}",
            f"{row['times_copy']:.2f}",
        ]
        for row in rows
    ]
    told = f"{rows[0]['mib']:.1f} MiB, medians of {rows[0]['rounds']}. {conditions(rows[0])}"
    return f"# Checkpoint\n\n{told}\n\n{table(COLUMNS, lines)}\n"
