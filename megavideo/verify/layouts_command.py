"""`megavideo verify-layouts`: does every parallel layout train like one process?"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from megavideo import options
from megavideo.config.command import config_arguments
from megavideo.config.layout_names import Layout, parse_layout
from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.engine.errors import RunFailed
from megavideo.files import write_json
from megavideo.log import progress
from megavideo.verify.layout_runs import (
    Case,
    Difference,
    Trace,
    compare,
    golden_traces,
    layout_traces,
    variant,
)

LAYOUTS = "tp2 pp2 tp2-sp pp2-tp2 pp2-vp2 dp2-zero2 dp4-zero3 pp2-tp2-dp2-zero1"
# Sections that a configuration must have and this command does not read.
UNUSED = (
    "data.train=made-up",
    "data.text_tokenizer=made-up",
    "run.directory=made-up",
    "run.evaluate_every=0",
    "parallel.world_size=0",
)


@dataclass(frozen=True)
class Row:
    """One training of one layout, against one process.

    Attributes:
        difference: None if it failed; `error` then says how.
    """

    layout: str
    processes: int
    case: str
    difference: Difference | None
    ok: bool
    error: str = ""


@click.command()
@config_arguments
@options.layouts(LAYOUTS)
@click.option("--steps", default=3, show_default=True, help="Optimizer steps to compare.")
@click.option("--batch", default=8, show_default=True, help="Samples a step.")
@click.option(
    "--micro-batch", default=1, show_default=True, help="Samples that a rank computes at once."
)
@click.option(
    "--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Of weights and activations; with a lower one, raise the tolerances.",
)  # fmt: skip
@click.option(
    "--loss-tolerance", default=1e-5, show_default=True,
    help="Largest difference of a step's loss, and relative one of its gradient norm.",
)  # fmt: skip
@click.option(
    "--update-tolerance", default=1e-4, show_default=True,
    help="Largest difference in a parameter's update, relative to the update's largest element.",
)  # fmt: skip
@options.layout_deadline(300.0)
@options.json_output
def main(
    files: tuple[str, ...],
    assignments: tuple[str, ...],
    layouts: str,
    steps: int,
    batch: int,
    micro_batch: int,
    precision: str,
    loss_tolerance: float,
    update_tolerance: float,
    deadline: float,
    output: Path | None,
) -> None:
    """Train a few steps in each of LAYOUTS and in a plain loop of one process, and compare.

    All start from the same seeded weights and draw the same made-up batches, once for each of SGD
    and AdamW, with and without clipping. The worlds are started here, on this machine's GPUs or,
    if it has none, on CPU cores. Of FILES only model, recipe and parallel are used. Exits with 1
    if a layout fails or is out of tolerance.

    \b
    Example:
      megavideo verify-layouts configs/model/demo.yaml configs/recipe/demo-stage1.yaml \\
          configs/parallel/laptop.yaml --layouts "tp2 pp2 dp2-zero2"
    """
    recipe = {"batch": batch, "micro_batch": micro_batch, "precision": precision}
    sizes = [f"recipe.{key}={value}" for key, value in recipe.items()]
    config = load_config(files, [*assignments, *sizes, *UNUSED])
    wanted = [parse_layout(name) for name in layouts.split()]
    if not wanted:
        raise ValueError("--layouts names no layout")
    for layout in wanted:  # all that cannot be is refused before the first is trained
        variant(config, layout.settings, Case("sgd", 0.0))
    rows = []
    width = max(20, *(len(layout.name) for layout in wanted))
    click.echo(f"{'layout':<{width}} {'case':<15} {'loss':>8} {'norm':>8} {'update':>8}")
    tolerances = (loss_tolerance, update_tolerance)
    for row in _compare_all(config, wanted, steps, deadline, tolerances):
        rows.append(row)
        click.echo(_format(row, width))
    if output:
        write_json(output, [asdict(row) for row in rows])
    missed = sorted({row.layout for row in rows if not row.ok})
    click.echo(f"{len(wanted)} layouts compared with one process, {len(missed)} out of tolerance")
    if missed:
        sys.exit(1)


def _compare_all(
    config: Config,
    layouts: list[Layout],
    steps: int,
    deadline_s: float,
    tolerances: tuple[float, float],
) -> Iterator[Row]:
    with progress("verifying layouts", len(layouts) + 1) as advance:
        golden = golden_traces(config, steps)
        advance(note="one process")
        for layout in layouts:
            yield from _compare_one(config, layout, golden, steps, deadline_s, tolerances)
            advance(note=layout.name)


def _compare_one(
    config: Config,
    layout: Layout,
    golden: Mapping[Case, Trace],
    steps: int,
    deadline_s: float,
    tolerances: tuple[float, float],
) -> Iterator[Row]:
    try:
        traces = layout_traces(config, layout, list(golden), steps, deadline_s)
    except RunFailed as error:
        yield Row(layout.name, layout.world_size, "", None, False, str(error))
        return
    for case, trace in traces.items():
        difference = compare(trace, golden[case])
        ok = _within(difference, *tolerances)
        yield Row(layout.name, layout.world_size, case.name, difference, ok)


def _within(difference: Difference, loss_tolerance: float, update_tolerance: float) -> bool:
    """Whether all is in tolerance; NaN is not."""
    return (
        difference.loss <= loss_tolerance
        and difference.norm <= loss_tolerance
        and difference.update <= update_tolerance
    )


def _format(row: Row, width: int) -> str:
    if row.difference is None:
        return f"{row.layout:<{width}} FAILED\n{row.error}"
    found = row.difference
    numbers = f"{found.loss:8.1e} {found.norm:8.1e} {found.update:8.1e}"
    verdict = "ok" if row.ok else f"MISS  worst in {found.parameter}"
    return f"{row.layout:<{width}} {row.case:<15} {numbers} {verdict}"
