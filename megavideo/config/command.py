"""`megavideo config`: print what a run would be configured with, or what every setting means."""

from collections.abc import Callable
from typing import Any

import click
from pydantic import BaseModel

from megavideo.config.load import dump_config, load_config
from megavideo.config.schema import Config


def config_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add FILES and --set, which every command that reads a configuration takes."""
    command = click.option(
        "--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE",
        help="Override one setting; may be repeated, the last one wins.",
    )(command)  # fmt: skip
    return click.argument("files", nargs=-1, type=click.Path())(command)


@click.command()
@config_arguments
@click.option("--explain", is_flag=True, help="List every setting with its default and meaning.")
def main(files: tuple[str, ...], assignments: tuple[str, ...], explain: bool) -> None:
    """Print the resolved configuration of a run as YAML.

    \b
    Example:
      megavideo config configs/model/demo.yaml configs/recipe/stage1.yaml \\
          configs/data/demo.yaml --set recipe.steps=20 --set run.directory=runs/try
    """
    if explain:
        click.echo("\n".join(_explain(Config)))
    else:
        click.echo(dump_config(load_config(files, assignments)), nl=False)


def _explain(section: type[BaseModel], prefix: str = "") -> list[str]:
    lines = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += _explain(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else repr(field.default)
            lines.append(f"{prefix}{name} = {default}\n    {field.description}")
    return lines
