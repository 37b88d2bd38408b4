"""`megavideo benchmark`: one subcommand per subject."""

import click

from megavideo.benchmark.attention import main as attention
from megavideo.benchmark.generation import main as generation


@click.group()
def main() -> None:
    """Measure speed, beside that of alternatives, in one process on this machine.

    \b
    Example:
      megavideo benchmark attention --output runs/benchmark
      megavideo benchmark generate --output runs/benchmark
    """


main.add_command(attention, "attention")
main.add_command(generation, "generate")
