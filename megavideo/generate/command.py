"""`megavideo generate`: videos from prompts, by a checkpoint of each stage."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import torch

from megavideo.config.schema import ParallelConfig, Precision
from megavideo.engine.world import join_world
from megavideo.generate.run import generate, given_frames, load_tokenizer
from megavideo.generate.settings import Settings
from megavideo.generate.work import superres_flops
from megavideo.log import rank
from megavideo.superres.upsample import CODE_TEMPERATURE

TIMEOUT_MINUTES = 30.0
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)
NATURAL = click.IntRange(min=0)
POSITIVE = click.FloatRange(min=0, min_open=True)


def option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """click's, showing defaults."""
    return click.option(*names, show_default="default" in settings, **settings)


@click.command()
@option("--checkpoint", type=FOLDER, help="Stage 1: a checkpoint's folder, or a run's.")
@option("--stage2", type=FOLDER, help="Stage 2, likewise: frames between frames.")
@option("--superres", type=FOLDER, help="Super-resolution, of `megavideo train-superres`.")
@option("--refine", type=FOLDER, help="Iterative super-resolution, for what --superres made.")
@option("--model", type=FILE, help="Sizes of weights that are no run: as cogvideo-9b.yaml.")
@option("--window", type=NATURAL, default=10, help="Of stage 2's windows, for such weights.")
@option("--image-tokenizer", type=FILE, required=True, help="The VQ-VAE of the training data.")
@option("--text-tokenizer", type=FILE, help="sentencepiece model.  [default: the run's]")
@option("--output", type=FOLDER, required=True, help="Gets a folder for each video.")
@option("--prompt", multiple=True, help="What to show; may be repeated.")
@option("--prompts", type=FILE, help="A file with one prompt a line.")
@option("--samples", type=COUNT, default=1, help="Videos of each prompt.")
@option("--first-frame", type=FILE, help="Picture (or video) whose first frame every video has.")
@option("--interpolate", type=FILE, help="Put frames between this video's, taken at --fps.")
@option("--fps", type=POSITIVE, default=1.0, help="Frames a second of keyframes.")
@option(
    "--rounds", type=NATURAL, help="How often stage 2 doubles the rate.  [default: 3 with --stage2]"
)
@option("--seed", type=NATURAL, default=0, help="Another one gives another video.")
@option("--guidance", type=POSITIVE, default=1.0, help="Scale for keyframes; 1 has no guider.")
@option("--text-weight", default=0.0, help="Added to the scores of text where nothing guides.")
@option("--first-temperature", default=1.0, help="Of the first frame's logits.")
@option("--first-top-k", type=NATURAL, default=16, help="Codes, or clusters, of the first frame.")
@option("--temperature", default=1.05, help="Of later frames' logits; 0 takes the likeliest.")
@option("--top-k", type=NATURAL, default=12, help="Codes, or clusters, that stay; 0 keeps all.")
@option("--top-p", default=1.0, help="The likeliest codes with this sum of probability stay.")
@option("--clusters", type=FILE, help="Labels of codes, of `megavideo cluster-codes`.")
@option("--code-temperature", type=POSITIVE, default=0.89, help="For a code inside its cluster.")
@option(
    "--superres-temperature", type=POSITIVE, default=CODE_TEMPERATURE,
    help="For a code of --superres (of its cluster); a low one makes clean shapes.",
)  # fmt: skip
@option("--image-suffix", default="", help="Appended to the prompt for the first frame.")
@option("--video-suffix", default="", help="Appended for keyframes, and the guider's prompt.")
@option("--reference-compat", is_flag=True, help="Windows as the published decoder cuts them.")
@option(
    "--precision", type=click.Choice(get_args(Precision)), help="Of weights.  [default: the run's]"
)
@option("--batch", type=COUNT, default=8, help="Videos, and runs of frames, decoded at once.")
@option("--tp", type=COUNT, default=1, help="Processes that share a model, under torchrun.")
@option("--dry-run", is_flag=True, help="Say what there is to do, and do nothing.")
def main(**options: Any) -> None:
    """Generate videos: a first frame, keyframes (stage 1), frames between frames (stage 2); with
    --superres, each frame is then enlarged, and with --refine a part of it drawn anew in rounds.

    Each video gets a folder OUTPUT/NAME with video.mp4, video.gif, frames.png, tokens.npy and
    about.json. A call that was cut off goes on where it was: run it again. A video depends on its
    prompt, --seed and the settings, not on the other prompts, --batch or the number of processes.

    With 5 keyframes at 1 fps, rounds give 9 frames at 2 fps, 17 at 4 and 33 at 8.

    \b
    Example:
      megavideo generate --checkpoint runs/stage1 --stage2 runs/stage2 \\
          --image-tokenizer image.safetensors --output videos \\
          --prompt "a red circle moves up on a white background"
    The published model (SAT's folders as they are) with its settings:
      megavideo generate --checkpoint cogvideo-stage1 --stage2 cogvideo-stage2 \\
          --model configs/model/cogvideo-9b.yaml --text-tokenizer ice_text.model \\
          --image-tokenizer ice_image.pt --clusters cluster_label2.npy --guidance 3 \\
          --text-weight 1.4 --image-suffix " 高清摄影" --video-suffix " 视频" ...
    Several processes, two of which share each model:
      torchrun --nproc-per-node 8 -m megavideo generate --tp 2 ...
    """
    settings = Settings(**options)
    _check_once(settings)
    if settings.dry_run:
        click.echo(describe(settings))
        return
    world = join_world(TIMEOUT_MINUTES, ParallelConfig(tp=settings.tp, recompute="none"))
    done = generate(settings, world)
    if world.rank == 0:
        click.echo(done)
    torch.distributed.destroy_process_group()


def _check_once(settings: Settings) -> None:
    """Every rank reads the same files; a mistake is told once."""
    try:
        settings.check()
        settings.described()
    except (ValueError, FileNotFoundError):
        if rank():
            sys.exit(2)
        raise


def describe(settings: Settings) -> str:
    """What a call would do, in words and numbers."""
    tokenizer = load_tokenizer(settings)
    given = len(given_frames(settings, tokenizer))
    one, videos = settings.work(given), len(settings.requests)
    everything = one * videos
    frames, fps = settings.frames(given), settings.fps * 2**settings.doublings
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return "\n".join(
        (
            f"videos   {videos} of {frames} frames at {fps:g} fps, as many folders of 5 files in "
            f"{settings.output}",
            f"tokens   {one.tokens:,} a video, {everything.tokens:,} in all",
            f"work     {one.sequences} sequences a video, {everything.flops / 1e12:,.3f} TFLOP in "
            "all",
            *_enlarging(settings, frames * videos, tokenizer.config.compress_rate),
            f"layout   {processes} process(es), {settings.tp} share a model, {settings.batch} "
            "videos at once",
        )
    )


def _enlarging(settings: Settings, frames: int, pixels: int) -> list[str]:
    """A line on super-resolution, if there is any; `pixels` per token and axis."""
    configs = [config for _, config in settings.superres_stages.values()]
    if not configs:
        return []
    side, flops = configs[0].fine_side, frames * superres_flops(configs)
    refined = ", then refined" if len(configs) > 1 else ""
    return [
        f"enlarge  {frames} frames to {side} x {side} tokens ({side * pixels} x {side * pixels} "
        f"pixels){refined}, {flops / 1e12:,.3f} TFLOP in all"
    ]


if __name__ == "__main__":
    main()
