"""Options that several commands have: one meaning, one wording, one type.

An option whose default differs between commands is a function of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from megavideo.data.workers import num_cores

Option = Callable[[Callable[..., Any]], Callable[..., Any]]

# What is written and read.
json_output = click.option(
    "--json", "output", type=click.Path(dir_okay=False, path_type=Path),
    help="Write the result here.",
)  # fmt: skip
results_folder = click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder for results."
)
text_tokenizer = click.option(
    "--text-tokenizer", type=click.Path(path_type=Path), required=True, help="sentencepiece model."
)
image_tokenizer = click.option(
    "--image-tokenizer", type=click.Path(path_type=Path), required=True, help="VQ-VAE model."
)
videos_folder = click.option(
    "--videos", type=click.Path(path_type=Path),
    help="Folder that the paths in the table start from.  [default: the table's folder]",
)  # fmt: skip

# Where it runs.
device = click.option(
    "--device", default=lambda: "cuda" if torch.cuda.is_available() else "cpu",
    show_default="cuda if there is one",
)  # fmt: skip
cpu_or_cuda = click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
reading_workers = click.option(
    "--workers", type=click.IntRange(min=1), default=num_cores, show_default="one per core",
    help="Processes that read the files.",
)  # fmt: skip

# The small trainers, of the image tokenizer and of super-resolution.
seed = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
save_every = click.option(
    "--save-every", type=click.IntRange(min=1), default=500, show_default=True,
    help="Steps between checkpoints, from which an interrupted run continues.",
)  # fmt: skip


def learning_rate(default: float) -> Option:
    """The highest of a trainer with `trainer_file.warm_cosine`."""
    return click.option(
        "--learning-rate", type=click.FloatRange(min=0, min_open=True), default=default,
        show_default=True,
        help="At its highest; it warms up and then falls to zero along a cosine.",
    )  # fmt: skip


def layouts(default: str) -> Option:
    """Names that `config.layout_names.parse_layout` reads, between blanks."""
    return click.option(
        "--layouts", default=default, show_default=True,
        help="Names: any of ppN tpN dpN vpN (chunks a stage) zeroN sp offload compile "
        "recompute (or recompute-attention, -mlp, -none), joined by '-'. What a name leaves out is "
        "as the configuration has it; sizes are 1.",
    )  # fmt: skip


def layout_deadline(default: float) -> Option:
    """Of a world that is started for one layout."""
    return click.option(
        "--deadline", default=default, show_default=True, help="Seconds a layout may take."
    )
