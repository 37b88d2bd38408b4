"""Named figures that a command found: a line each for people, JSON for programs."""

from collections.abc import Mapping
from pathlib import Path

import click

from megavideo.files import write_json


def report_figures(figures: Mapping[str, str | int | float], output: Path | None) -> None:
    """Print `figures`, and write them to `output` if it is given."""
    for name, value in figures.items():
        click.echo(f"{name:<16} {value:.4f}" if isinstance(value, float) else f"{name:<16} {value}")
    if output is not None:
        write_json(output, figures)
