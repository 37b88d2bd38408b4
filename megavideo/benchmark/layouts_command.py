"""`megavideo benchmark layouts`: the same training step in several layouts, side by side."""

import json
from pathlib import Path

import click

from megavideo import options
from megavideo.benchmark.plan_check import prediction_page, with_predictions
from megavideo.benchmark.results import Row, write_results
from megavideo.benchmark.step import Window
from megavideo.benchmark.step_command import ALWAYS, UNUSED, window_options
from megavideo.benchmark.step_page import measured, page, picture, with_ratios
from megavideo.benchmark.worlds import Case, measure_case
from megavideo.config.command import config_arguments
from megavideo.config.deepspeed import accumulation_steps, check_schedule
from megavideo.config.layout_names import Layout, parse_layout
from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.log import progress
from megavideo.plan.hardware import load_hardware

LAYOUTS = "dp2-zero1 dp2-zero3 tp2 tp2-sp pp2 pp2-vp2"


@click.command()
@config_arguments
@options.results_folder
@options.layouts(LAYOUTS)
@window_options
@options.layout_deadline(600.0)
@click.option(
    "--check-plan", "profile",
    help="Hardware as `megavideo plan --gpu` takes it, best what `megavideo calibrate` wrote here: "
    "print its predictions beside what was measured.",
)  # fmt: skip
def main(
    files: tuple[str, ...],
    assignments: tuple[str, ...],
    output: Path,
    layouts: str,
    warmup: int,
    steps: int,
    split_steps: int,
    deadline: float,
    profile: str | None,
) -> None:
    """Measure the training step of a configuration in each of LAYOUTS, on this machine.

    Worlds are started here, on GPUs or, where there are none, on CPU cores (a world larger than the
    cores measures their sharing). All train the same recipe.batch on made-up samples. Writes
    layouts.json, layouts.md and layouts.png; ratios are to the first layout. One that fails, out of
    memory or otherwise, gets a reason in place of figures.

    \b
    Example:
      megavideo benchmark layouts configs/model/demo.yaml configs/recipe/demo-stage1.yaml \\
          configs/parallel/laptop.yaml --output runs/benchmark --layouts "dp2-zero1 tp2 pp2"
    """
    hardware = load_hardware(profile) if profile else None
    config = load_config(files, [*UNUSED, *assignments, *ALWAYS, "parallel.world_size=0"])
    wanted = [parse_layout(name) for name in layouts.split()]
    if not wanted:
        raise ValueError("--layouts names no layout")
    cases = [Case(layout.name, _laid_out(config, layout), layout.world_size) for layout in wanted]
    window, rows = Window(warmup, steps, split_steps), []
    with progress("measuring layouts", len(cases)) as advance:
        for case in cases:
            rows.append(measure_case(case, window, deadline))
            advance(note=case.name)
    rows = with_ratios(rows)
    if hardware is None:
        _tell(output, rows, [])
        return
    rows = with_predictions(rows, cases, hardware)
    _tell(output, rows, [prediction_page(rows, hardware)])


def _tell(output: Path, rows: list[Row], further: list[str]) -> None:
    title = "Layouts"
    text = "\n\n".join([page(title, rows), *further])
    write_results(output, "layouts", rows, f"{text}\n", picture(title, rows))
    click.echo(text)
    failed = [row["layout"] for row in rows if "reason" in row]
    if not measured(rows):
        raise click.ClickException(f"no layout could be measured: {', '.join(failed)}")


def _laid_out(config: Config, layout: Layout) -> Config:
    """`config` in a layout.

    Raises:
        ValueError: if it is refused.
    """
    tree = config.model_dump(mode="json")
    tree["parallel"] |= layout.settings
    # Through JSON, because strict validation of Python objects refuses a list for a tuple.
    laid_out = Config.model_validate_json(json.dumps(tree))
    pp, tp = laid_out.parallel.pp, laid_out.parallel.tp
    replicas = layout.world_size // (pp * tp)
    check_schedule(laid_out.parallel, accumulation_steps(laid_out.recipe, replicas))
    return laid_out
