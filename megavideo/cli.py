"""The `megavideo` command: one table from subcommand to function, imported when it is chosen.

`megavideo --help` therefore imports neither torch nor deepspeed.
"""

import importlib
import sys
from typing import Any

import click

from megavideo import __version__
from megavideo.log import setup_logging

# name -> (where it is, one line of help: repeated here so that `--help` imports none of them).
COMMANDS = {
    "render-clips": (
        "megavideo.data_tools.render_clips:main",
        "Render captioned clips of moving shapes as video files.",
    ),
    "train-text-tokenizer": (
        "megavideo.data_tools.train_text_tokenizer:main",
        "Train a sentencepiece tokenizer on captions.",
    ),
    "train-image-tokenizer": (
        "megavideo.data_tools.train_image_tokenizer:main",
        "Train a VQ-VAE that turns frames into tokens.",
    ),
    "cluster-codes": (
        "megavideo.data_tools.cluster_codes:main",
        "Group the image tokenizer's codes, for cluster sampling.",
    ),
    "train-superres": (
        "megavideo.superres.command:main",
        "Train super-resolution on a frozen base: tokens of a frame three times as large.",
    ),
    "tokenize-videos": (
        "megavideo.data_tools.tokenize_videos:main",
        "Decode captioned videos and write their tokens as shards.",
    ),
    "build-index": (
        "megavideo.data_tools.build_index:main",
        "List every sample of a folder of shards, for training.",
    ),
    "verify-shards": (
        "megavideo.data_tools.verify_shards:main",
        "Read and check every sample of a folder of shards.",
    ),
    "inspect-shards": (
        "megavideo.data_tools.inspect_shards:main",
        "Print samples of a folder of shards, and draw them.",
    ),
    "config": (
        "megavideo.config.command:main",
        "Print the resolved configuration of a run.",
    ),
    "train": (
        "megavideo.train.command:main",
        "Train a model, or go on with a run.",
    ),
    "doctor": (
        "megavideo.doctor.command:main",
        "Would training work on these nodes? One verdict a line.",
    ),
    "evaluate": (
        "megavideo.train.evaluate_command:main",
        "Loss on held-out clips, with right or shuffled captions.",
    ),
    "generate": (
        "megavideo.generate.command:main",
        "Generate videos from prompts.",
    ),
    "score-clips": (
        "megavideo.data_tools.score_clips:main",
        "Judge generated clips by their prompts' colour and motion.",
    ),
    "analyze": (
        "megavideo.analysis.command:main",
        "Plot how a trained model uses its two channels.",
    ),
    "evaluate-videos": (
        "megavideo.metrics.command:main",
        "FVD and Inception Score of generated clips, by networks that you name.",
    ),
    "benchmark": (
        "megavideo.benchmark.command:main",
        "Measure speed beside that of alternatives.",
    ),
    "plan": (
        "megavideo.plan.command:main",
        "Predict the fastest layout on machines that are described, not at hand.",
    ),
    "calibrate": (
        "megavideo.benchmark.calibration.command:main",
        "Measure this machine for `megavideo plan`.",
    ),
    "report": (
        "megavideo.report.command:main",
        "Loss curves, predicted frames and figures of runs.",
    ),
    "convert": (
        "megavideo.checkpoint.convert_command:main",
        "Write a checkpoint in another format, or cut for other ranks.",
    ),
    "checkpoint": (
        "megavideo.checkpoint.command:main",
        "Inspect, verify, compare and remove checkpoints.",
    ),
    "verify-reference": (
        "megavideo.verify.command:main",
        "Compare the model with arrays that the published one computed.",
    ),
    "verify-layouts": (
        "megavideo.verify.layouts_command:main",
        "Train in parallel layouts and in one process, and compare.",
    ),
}

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError)


class LazyGroup(click.Group):
    """A group whose subcommands are imported on use (click's documented lazy-loading pattern)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, function = COMMANDS[cmd_name][0].split(":")
        return getattr(importlib.import_module(module), function)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="megavideo")
def group() -> None:
    """Pretrain CogVideo-style text-to-video transformers.

    Start with `make demo`, which runs every step below on small data and prints each command.
    Every command has its own --help with an example.
    """


def main() -> None:
    """Run a subcommand."""
    run(group, prog_name="megavideo")


def run(command: click.Command, **options: Any) -> None:
    """Run `command`; a user's mistake becomes one line on stderr and exit status 2.

    So does what the system says of a file, as that its disk is full.
    """
    setup_logging()
    try:
        command(**options)
    except (ValueError, OSError) as error:
        if not isinstance(error, USER_ERRORS) and error.filename is None:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
