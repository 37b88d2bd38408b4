"""Render procedural captioned clips to video files: data for a first run that needs no download."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from megavideo.data.captions import Caption, write_captions
from megavideo.data.scenes import draw_scene, make_scene
from megavideo.data.video import CODECS, read_clip, read_comment, write_video
from megavideo.data.workers import map_processes, num_cores
from megavideo.log import log, progress

SCENES_VERSION = 1  # raise it when the same seed and number give another picture
CLIPS_PER_TASK = 8  # a clip takes about 15 ms: fewer would mostly pay for passing messages


@dataclass(frozen=True)
class Rendering:
    """What all clips of one folder have in common."""

    folder: Path
    size: int
    fps: float
    seconds: float
    codec: str
    seed: int

    @property
    def num_frames(self) -> int:
        return round(self.seconds * self.fps)

    def path(self, number: int) -> Path:
        return self.folder / f"clip-{number:06d}.mp4"

    def comment(self, number: int) -> str:
        """Written into the file: a clip with this comment is the one that would be rendered."""
        return (
            f"megavideo render-clips v{SCENES_VERSION} seed={self.seed} clip={number} "
            f"size={self.size} fps={self.fps} seconds={self.seconds} codec={self.codec}"
        )


def render(rendering: Rendering, number: int) -> bool:
    """Make clip `number` unless it is there already; whether it was made.

    Raises: ValueError if another program or other settings made the file.
    """
    path = rendering.path(number)
    if path.exists() and _is_done(rendering, number):
        return False
    frames = draw_scene(make_scene(rendering.seed, number), rendering.size, rendering.num_frames)
    write_video(path, frames, rendering.fps, rendering.codec, rendering.comment(number))
    return True


def _is_done(rendering: Rendering, number: int) -> bool:
    path = rendering.path(number)
    try:
        found = read_comment(path)
        complete = len(read_clip(path, rendering.fps).frames) == rendering.num_frames
    except ValueError as error:
        log.warning("rendering a damaged clip again: %s", error)
        return False
    if found != rendering.comment(number):
        raise ValueError(
            f"{path} was made with other settings ({found or 'no comment'}); expected "
            f"{rendering.comment(number)}: choose another --out or remove the folder"
        )
    return complete


def render_all(rendering: Rendering, count: int, workers: int) -> int:
    """Render clips 0..count-1 in `workers` processes; returns how many were made anew."""
    made = 0
    with progress("rendering", total=count) as advance:
        work = partial(render, rendering)
        for is_new in map_processes(work, range(count), workers, CLIPS_PER_TASK):
            made += is_new
            advance()
    return made


def _captions(rendering: Rendering, count: int) -> list[Caption]:
    return [
        Caption(rendering.path(number).name, make_scene(rendering.seed, number).caption)
        for number in range(count)
    ]


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the clips and their captions.",
)
@click.option(
    "--count", type=click.IntRange(min=1), default=600, show_default=True, help="Number of clips."
)
@click.option(
    "--size", type=click.IntRange(min=16), default=64, show_default=True, help="Side in pixels."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=5.0,
    show_default=True,
    help="Length of a clip.",
)
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True),
    default=8.0,
    show_default=True,
    help="Frames per second.",
)
@click.option(
    "--codec",
    type=click.Choice(CODECS),
    default=CODECS[0],
    show_default=True,
    help="H.264 or MPEG-4 part 2.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Another seed gives other clips.",
)
@click.option(
    "--captions",
    "table",
    type=click.Choice(["csv", "jsonl", "parquet"]),
    default="csv",
    show_default=True,
    help="Kind of captions table.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=num_cores,
    show_default="one per core",
    help="Processes. The files do not depend on it.",
)
def main(
    out: Path,
    count: int,
    size: int,
    seconds: float,
    fps: float,
    codec: str,
    seed: int,
    table: str,
    workers: int,
) -> None:
    """Render captioned clips of moving shapes to the folder OUT.

    Clip n is a function of --seed and n, so more clips can be added later with a larger --count and
    an interrupted run continues where it stopped. Captions go to a table beside the clips, with the
    columns video and caption.

    \b
    Example:
      megavideo render-clips --out runs/clips --count 600
    """
    started = time.monotonic()
    rendering = Rendering(out, size, fps, seconds, codec, seed)
    if rendering.num_frames < 1:
        raise ValueError(f"--seconds {seconds} at --fps {fps} is less than one frame")
    made = render_all(rendering, count, workers)
    captions = _captions(rendering, count)
    write_captions(out / f"captions.{table}", captions)
    _summarise(rendering, captions, made, time.monotonic() - started)


def _summarise(rendering: Rendering, captions: list[Caption], made: int, seconds: float) -> None:
    count = len(captions)
    megabytes = sum(rendering.path(number).stat().st_size for number in range(count)) / 1e6
    texts = len({caption.text for caption in captions})
    click.echo(
        f"rendered {made} clips, kept {count - made}: "
        f"{count * rendering.num_frames / rendering.fps:.0f} s of video, "
        f"{texts} different captions, {megabytes:.1f} MB in {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
