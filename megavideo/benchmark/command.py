"""`megavideo benchmark`: one subcommand per subject."""

from pathlib import Path

import click

from megavideo.benchmark.attention import main as attention
from megavideo.benchmark.checkpoint_command import main as checkpoint
from megavideo.benchmark.generation import main as generation
from megavideo.benchmark.layouts_command import main as layouts
from megavideo.benchmark.loader_command import main as loader
from megavideo.benchmark.results import compare
from megavideo.benchmark.step_command import main as step


@click.group(invoke_without_command=True)
@click.option(
    "--compare", "pair", nargs=2, type=click.Path(path_type=Path, exists=True),
    metavar="A.json B.json", help="Print the figures of two results side by side, with B / A.",
)  # fmt: skip
@click.pass_context
def main(context: click.Context, pair: tuple[Path, Path] | None) -> None:
    """Measure speed, beside that of alternatives, on this machine (docs/benchmarks.md).

    \b
    Example:
      megavideo benchmark step configs/model/demo.yaml configs/recipe/demo-stage1.yaml \\
          configs/parallel/laptop.yaml --output runs/benchmark --against published
      megavideo benchmark --compare before/step.json runs/benchmark/step.json
    """
    if pair is not None:
        click.echo(compare(*pair))
    elif context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(step, "step")
main.add_command(layouts, "layouts")
main.add_command(loader, "loader")
main.add_command(checkpoint, "checkpoint")
main.add_command(attention, "attention")
main.add_command(generation, "generate")
