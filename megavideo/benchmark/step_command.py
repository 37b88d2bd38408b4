"""`megavideo benchmark step`: a training step's length, utilisation, memory, and its phases."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import torch

from megavideo import options
from megavideo.benchmark.published import check_published
from megavideo.benchmark.results import Row, write_results
from megavideo.benchmark.step import (
    EAGER,
    PUBLISHED,
    Steps,
    Window,
    build,
    made_up_batches,
    measure,
    snapshot_memory,
    trace,
)
from megavideo.benchmark.step_page import measured, page, picture, with_ratios
from megavideo.benchmark.worlds import Case, measure_case
from megavideo.config.command import config_arguments
from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.data.batch import Batch, open_stream
from megavideo.engine.engine import Engine
from megavideo.engine.world import World, join_world
from megavideo.log import rank

# Sections that a configuration must have and a step on made-up data does not read.
UNUSED = ("data.train=made-up", "data.text_tokenizer=made-up")
# A step's length does not depend on where weights come from, nor a measurement on a run.
ALWAYS = (
    "run.directory=measured", "run.evaluate_every=0", "recipe.base=null", "recipe.start_from=null",
)  # fmt: skip


def window_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add how many steps are made."""
    for option in (
        click.option("--warmup", default=3, show_default=True, help="Steps that do not count."),
        click.option(
            "--steps", default=20, show_default=True, type=click.IntRange(2),
            help="Steps that are measured.",
        ),
        click.option(
            "--split-steps", default=5, show_default=True, type=click.IntRange(1),
            help="Further steps, in which each phase is timed.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


@click.command()
@config_arguments
@options.results_folder
@window_options
@click.option(
    "--synthetic/--data", default=True, show_default=True,
    help="Made-up batches, so that only the model is measured; or those of data.train.",
)  # fmt: skip
@click.option(
    "--accumulate", type=click.IntRange(1),
    help="Micro-batches of a step; recipe.batch follows from it. By default recipe.batch counts.",
)  # fmt: skip
@click.option(
    "--against", multiple=True, type=click.Choice([PUBLISHED, EAGER]),
    help="Also run, in turn and on the same parameters, the published dense-masked step, or ours "
    "without parallel.compile. Can be given twice.",
)  # fmt: skip
@click.option("--trace", "traced", is_flag=True, help="Write torch's profile of one more step.")
@click.option(
    "--memory-snapshot", is_flag=True, help="Write every allocation of one more step on a GPU."
)
@click.option(
    "--find-micro-batch", is_flag=True,
    help="Measure growing micro-batches, each in a world of its own, and name the fastest. A step "
    "then has --accumulate micro-batches, 1 by default. Not under torchrun.",
)  # fmt: skip
@click.option(
    "--largest", default=64, show_default=True, type=click.IntRange(1),
    help="Largest micro-batch that --find-micro-batch tries.",
)  # fmt: skip
@click.option(
    "--memory-gib", default=0.0, type=click.FloatRange(0),
    help="With --find-micro-batch: memory that a device may take; by default all of it.",
)  # fmt: skip
@click.option(
    "--deadline", default=600.0, show_default=True,
    help="With --find-micro-batch: seconds that one micro-batch may take.",
)  # fmt: skip
def main(
    files: tuple[str, ...],
    assignments: tuple[str, ...],
    output: Path,
    warmup: int,
    steps: int,
    split_steps: int,
    synthetic: bool,
    accumulate: int | None,
    against: tuple[str, ...],
    traced: bool,
    memory_snapshot: bool,
    find_micro_batch: bool,
    largest: int,
    memory_gib: float,
    deadline: float,
) -> None:
    """Measure training steps of a configuration, in one process or under torchrun.

    Weights are random and nothing is saved. Writes step.json (a row a contender: what was measured
    and everything it must be read with), step.md and step.png; --find-micro-batch writes
    micro-batch.*. What the three utilisations count is in docs/benchmarks.md.

    \b
    Example, on a laptop:
      megavideo benchmark step configs/model/demo.yaml configs/recipe/demo-stage1.yaml \\
          configs/parallel/laptop.yaml --output runs/benchmark --against published
      torchrun --nproc-per-node 2 -m megavideo benchmark step configs/model/demo.yaml \\
          configs/recipe/demo-stage1.yaml configs/parallel/laptop.yaml --output runs/benchmark
    """
    given = (*UNUSED, *assignments) if synthetic else assignments
    config = load_config(files, [*given, *ALWAYS])
    window = Window(warmup, steps, split_steps)
    if EAGER in against and not config.parallel.compile:
        raise ValueError(
            "--against eager compares with parallel.compile=true; add --set parallel.compile=true"
        )
    if memory_snapshot and not torch.cuda.is_available():
        raise ValueError("--memory-snapshot records a GPU's allocator, and there is no GPU here")
    if find_micro_batch:
        if "RANK" in os.environ:
            raise ValueError("--find-micro-batch starts its own processes; run it without torchrun")
        _find(config, window, accumulate or 1, largest, memory_gib, deadline, output)
        return
    world = join_world(config.run.timeout_minutes, config.parallel)
    config = accumulated(config, accumulate, world.mesh.dp.size)
    if PUBLISHED in against:
        world.from_rank_zero(lambda: check_published(config))
    rows = _measure(config, world, window, synthetic, against, traced, memory_snapshot, output)
    if world.rank == 0:
        _tell(output, "step", "Training step", rows)
    torch.distributed.destroy_process_group()


def accumulated(config: Config, accumulate: int | None, replicas: int) -> Config:
    """`config` with steps of so many micro-batches; as it is without a number."""
    if accumulate is None:
        return config
    batch = accumulate * config.recipe.micro_batch * replicas
    return config.model_copy(update={"recipe": config.recipe.model_copy(update={"batch": batch})})


def _measure(
    config: Config,
    world: World,
    window: Window,
    synthetic: bool,
    against: tuple[str, ...],
    traced: bool,
    memory_snapshot: bool,
    output: Path,
) -> list[Row]:
    engine, batches = _open(config, world, synthetic)
    if world.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
    with closing(batches):  # type: ignore[type-var]  # a generator: closing it stops its threads
        try:
            rows = measure(config, engine, batches, window, against)
        except torch.OutOfMemoryError as error:
            raise click.ClickException(
                f"out of memory on rank {world.rank}: lower recipe.micro_batch="
                f"{config.recipe.micro_batch} (--find-micro-batch finds the largest that fits), or "
                f"set parallel.recompute=layer ({error})"
            ) from None
        more = Steps(engine, batches)
        if traced:
            trace(more, output / f"trace-rank{world.rank}.json")
        if memory_snapshot:
            snapshot_memory(more, output / f"memory-rank{world.rank}.pickle")
    data = "made-up batches" if synthetic else config.data.train
    return [row | {"data": data} for row in rows]


def _open(config: Config, world: World, synthetic: bool) -> tuple[Engine, Iterator[Batch]]:
    if synthetic:
        return build(config, world, "made-up data"), (x for x in made_up_batches(config, world))
    stream = world.first_on_rank_zero(
        lambda: open_stream(config.data, config.model, config.recipe, config.data.train)
    )
    replica = world.mesh.dp
    engine = build(config, world, stream.fingerprint)
    return engine, stream.micro_batches(0, replica.rank, replica.size)


def _find(
    config: Config,
    window: Window,
    accumulate: int,
    largest: int,
    memory_gib: float,
    deadline: float,
    output: Path,
) -> None:
    size = config.parallel.pp * config.parallel.tp

    def try_out(micro_batch: int) -> Row:
        recipe = config.recipe.model_copy(update={"micro_batch": micro_batch})
        wanted = accumulated(config.model_copy(update={"recipe": recipe}), accumulate, 1)
        case = Case(f"micro-batch {micro_batch}", wanted, size, memory_gib)
        return measure_case(case, window, deadline)

    rows = search(try_out, largest)
    _tell(output, "micro-batch", "Micro-batches", rows)
    best = max(measured(rows), key=lambda row: row["clips_per_s"])
    click.echo(f"\nfastest: recipe.micro_batch={best['micro_batch']}")


def search(try_out: Callable[[int], Row], largest: int) -> list[Row]:
    """Double the micro-batch until one fails, then try half way back; rows in rising order.

    Raises:
        ValueError: if not even one sample can be trained.
    """
    rows: list[Row] = []
    micro_batch = 1
    while micro_batch <= largest:
        rows.append(try_out(micro_batch))
        if "reason" in rows[-1]:
            break
        micro_batch *= 2
    if "reason" in rows[0]:
        raise ValueError(f"not even recipe.micro_batch=1 can be trained: {rows[0]['reason']}")
    if "reason" in rows[-1] and micro_batch > 2:
        rows.insert(-1, try_out(micro_batch * 3 // 4))
    return rows


def _tell(output: Path, name: str, title: str, rows: list[Row]) -> None:
    rows = with_ratios(rows)
    text = page(title, rows)
    write_results(output, name, rows, f"{text}\n", picture(title, rows))
    if rank() == 0:
        click.echo(text)
