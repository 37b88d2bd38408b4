"""`megavideo tokenize-videos`: decode videos, encode frames and captions, write shards."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path

import click

from megavideo import options
from megavideo.data.captions import read_captions
from megavideo.data.job_part import Part
from megavideo.data.sample import TokenClip
from megavideo.data.shards import Making, Sidecar, remove_shard, write_shard
from megavideo.data.tokenizing import (
    Failure,
    Item,
    Settings,
    ShardPlan,
    check_no_strangers,
    finished,
    load_tokenizers,
    make_plan,
    tokenize,
)
from megavideo.data.video import VIDEO_SUFFIXES
from megavideo.data.workers import map_survivors
from megavideo.files import atomic_write
from megavideo.log import log, progress

MIN_BROKEN = 100  # below it, a share says little


def _part(context: click.Context, option: click.Parameter, value: str) -> Part:
    try:
        return Part.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@click.argument("captions", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@options.videos_folder
@options.text_tokenizer
@options.image_tokenizer
@click.option(
    "--video-fps",
    type=click.FloatRange(min=0, min_open=True),
    default=8.0,
    show_default=True,
    help="Frames a second that are stored; training takes this rate and those that divide it.",
)
@click.option(
    "--size",
    type=click.IntRange(min=1),
    default=160,
    show_default=True,
    help="Pixels per side: the short side is scaled to it, the long one cut in the middle.",
)
@click.option(
    "--max-seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="Read only so much of each video.",
)
@click.option(
    "--clips-per-shard",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Videos that are planned for a shard; broken ones make it smaller.",
)
@click.option(
    "--holdout",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Share of the captions whose videos go to OUTPUT/validation.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    show_default="all cores",
    help="Processes; each uses one thread.",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="Where frames are encoded: cpu, cuda, cuda:1.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Frames encoded at once.",
)
@click.option(
    "--part",
    callback=_part,
    default="1/1",
    show_default=True,
    help="K/N: of N jobs that share OUTPUT, on GPUs or machines, this is the K-th.",
)
@click.option(
    "--max-broken",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help=f"Stop when more than this share of the videos, and over {MIN_BROKEN}, cannot be used.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
def main(
    captions: Path,
    output: Path,
    videos: Path | None,
    text_tokenizer: Path,
    image_tokenizer: Path,
    video_fps: float,
    size: int,
    max_seconds: float | None,
    clips_per_shard: int,
    holdout: float,
    workers: int,
    device: str,
    batch: int,
    part: Part,
    max_broken: float,
    dry_run: bool,
) -> None:
    """Turn captioned videos into shards of tokens: OUTPUT/train and OUTPUT/validation.

    CAPTIONS is a .csv, .jsonl or .parquet table with the columns `video` (a path) and `caption`.

    A clip is put aside for validation by a hash of its caption, so no caption is on both sides. A
    broken video is skipped and written to OUTPUT/failed.jsonl with the reason. A job that was cut
    off goes on where it was: run it again. Several jobs share the work by --part; the shards are
    the same in any number of parts.

    \b
    Example:
      megavideo tokenize-videos clips/captions.csv tokens --size 64 --holdout 0.1 \\
          --text-tokenizer text.model --image-tokenizer image.safetensors
      megavideo build-index tokens/train tokens/validation
    On eight GPUs, each job with its own; then build the index:
      megavideo tokenize-videos clips.csv tokens ... --device cuda:2 --workers 4 --part 3/8
    """
    started = time.monotonic()
    table = read_captions(captions)
    videos = videos or captions.parent
    settings = Settings(
        text_tokenizer, image_tokenizer, video_fps, size, device, batch, max_seconds
    )
    making = load_tokenizers(settings).making
    plans: Sequence[ShardPlan] = make_plan(
        table, videos, output, clips_per_shard, holdout, settings, making
    )
    check_no_strangers(plans)
    if part.number == 1:
        _warn_unnamed(videos, {item.video for plan in plans for item in plan.items})
    plans = part.choose(plans)
    if dry_run:
        _print_plan(plans, making)
        return
    with part.alone_in(output):
        sidecars, failures = _make_shards(plans, settings, making, workers, max_broken)
    failed_file = output / part.failed_file
    _write_failures(failed_file, failures)
    clips = sum(sidecar.count for sidecar in sidecars)
    videos_given = sum(len(plan.items) for plan in plans)
    if not clips:
        raise ValueError(
            f"none of the {videos_given} videos could be used, the first because: "
            f"{failures[0]['reason']}; see {failed_file}"
        )
    folders = sorted({str(plan.path.parent) for plan in plans})
    click.echo(
        f"tokenised {clips} of {videos_given} videos ({len(failures)} broken"
        f"{f', see {failed_file}' if failures else ''}) into {len(sidecars)} shards, "
        f"{sum(s.bytes for s in sidecars) / 1e6:.1f} MB in {time.monotonic() - started:.1f} s; "
        f"next: megavideo build-index {' '.join(folders)}"
    )


def _warn_unnamed(videos: Path, named: set[Path]) -> None:
    found = {path for path in videos.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES}
    if unnamed := found - named:
        log.warning(
            "%d videos in %s have no caption and are left out, as %s",
            len(unnamed), videos, min(unnamed).name,
        )  # fmt: skip


def _print_plan(plans: Sequence[ShardPlan], making: Making) -> None:
    for plan in plans:
        state = "finished" if finished(plan) else "to do"
        click.echo(f"{plan.path}: {len(plan.items)} videos, {state}")
    missing = [item.video for plan in plans for item in plan.items if not item.video.exists()]
    click.echo(
        f"{len(plans)} shards, {making.side}x{making.side} tokens a frame at {making.fps} fps, "
        f"{len(missing)} videos are missing{f', as {missing[0]}' if missing else ''}"
    )


class Broken:
    """Counts videos, and stops a job in which too many are broken: its folder may be unmounted."""

    def __init__(self, max_share: float):
        self.max_share = max_share
        self.seen = 0
        self.broken = 0

    def account(self, result: TokenClip | Failure) -> None:
        """Note a result. ValueError if there are too many failures."""
        self.seen += 1
        if not isinstance(result, Failure):
            return
        log.warning("skipped: %s", result.reason)
        self.broken += 1
        if self.broken > max(MIN_BROKEN, self.max_share * self.seen):
            raise ValueError(
                f"{self.broken} of {self.seen} videos could not be used, the last because: "
                f"{result.reason}; correct --videos, or raise --max-broken"
            )


def _make_shards(
    plans: Sequence[ShardPlan], settings: Settings, making: Making, workers: int, max_broken: float
) -> tuple[list[Sidecar], list[dict[str, str]]]:
    """Make what is not finished; all sidecars and all failures, those of earlier runs too."""
    done: dict[Path, Sidecar] = {}
    with progress("looking at videos and finished shards", total=len(plans)) as advance:
        for plan in plans:
            if sidecar := finished(plan):
                done[plan.path] = sidecar
            advance()
    if done:
        log.info("%d of %d shards are finished and whole; they are kept", len(done), len(plans))
    todo = [plan for plan in plans if plan.path not in done]
    items = chain.from_iterable(plan.items for plan in todo)
    failures = [failure for sidecar in done.values() for failure in sidecar.failed]
    sidecars = list(done.values())
    work = partial(tokenize, settings)
    broken = Broken(max_broken)
    with (
        closing(map_survivors(work, items, workers, 4 * workers, _died)) as results,  # type: ignore[type-var]  # a generator
        progress("tokenising", total=sum(len(plan.items) for plan in todo)) as advance,
    ):
        for plan in todo:
            failed: list[dict[str, str]] = []
            clips = _good(results, plan, failed, broken, advance)
            sidecar = _write(plan, clips, making, failed)
            sidecars += [sidecar] if sidecar else []
            failures += failed
    return sidecars, failures


def _died(item: Item) -> Failure:
    reason = f"video {item.video}: the process that read it died, of a fault or too little memory"
    return Failure(item.key, str(item.video), reason)


def _good(
    results: Iterator[TokenClip | Failure],
    plan: ShardPlan,
    failed: list[dict[str, str]],
    broken: Broken,
    advance: Callable[[], None],
) -> Iterator[tuple[str, TokenClip]]:
    """Pass on the clips with their keys; failures are noted and left out."""
    for item, result in zip(plan.items, islice(results, len(plan.items)), strict=True):
        advance()
        broken.account(result)
        if isinstance(result, Failure):
            failed.append(asdict(result))
        else:
            yield item.key, result


def _write(
    plan: ShardPlan,
    clips: Iterator[tuple[str, TokenClip]],
    making: Making,
    failed: list[dict[str, str]],
) -> Sidecar | None:
    """Write a shard from nothing; None if it would be empty."""
    remove_shard(plan.path)
    first = next(clips, None)
    if first is None:
        return None
    return write_shard(plan.path, chain([first], clips), making, plan.source, failed)


def _write_failures(path: Path, failures: Sequence[dict[str, str]]) -> None:
    """Replace the list of failures; none leaves no file."""
    if not failures:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as file:
        for failure in failures:
            file.write(json.dumps(failure, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    main()
