"""`megavideo tokenize-videos`: decode videos, encode frames and captions, write shards."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from multiprocessing import get_context
from pathlib import Path

import click

from megavideo.data.captions import read_captions
from megavideo.data.sample import TokenClip
from megavideo.data.shards import Making, Sidecar, remove_shard, write_shard
from megavideo.data.stream import read_ahead
from megavideo.data.tokenizing import (
    Failure,
    Settings,
    ShardPlan,
    check_no_strangers,
    finished,
    load_tokenizers,
    make_plan,
    tokenize,
)
from megavideo.data.video import VIDEO_SUFFIXES
from megavideo.files import atomic_write
from megavideo.log import log, progress

FAILED_FILE = "failed.jsonl"


@click.command()
@click.argument("captions", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--videos",
    type=click.Path(path_type=Path),
    help="Folder that the paths in the table start from.  [default: the table's folder]",
)
@click.option(
    "--text-tokenizer", type=click.Path(path_type=Path), required=True, help="sentencepiece model."
)
@click.option(
    "--image-tokenizer", type=click.Path(path_type=Path), required=True, help="VQ-VAE model."
)
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
    dry_run: bool,
) -> None:
    """Turn captioned videos into shards of tokens: OUTPUT/train and OUTPUT/validation.

    CAPTIONS is a .csv, .jsonl or .parquet table with the columns `video` (a path) and `caption`.

    A clip is put aside for validation by a hash of its caption, so no caption is on both sides. A
    broken video is skipped and written to OUTPUT/failed.jsonl with the reason. A job that was cut
    off goes on where it was: run it again.

    \b
    Example:
      megavideo tokenize-videos clips/captions.csv tokens --size 64 --holdout 0.1 \\
          --text-tokenizer text.model --image-tokenizer image.safetensors
      megavideo build-index tokens/train tokens/validation
    """
    started = time.monotonic()
    table = read_captions(captions)
    videos = videos or captions.parent
    settings = Settings(
        text_tokenizer, image_tokenizer, video_fps, size, device, batch, max_seconds
    )
    making = load_tokenizers(settings).making
    plans = make_plan(table, videos, output, clips_per_shard, holdout, settings, making)
    check_no_strangers(plans)
    _warn_unnamed(videos, {item.video for plan in plans for item in plan.items})
    if dry_run:
        _print_plan(plans, making)
        return
    with _pool(workers) as pool:
        sidecars, failures = _make_shards(pool, plans, settings, making, ahead=4 * workers)
    _write_failures(output / FAILED_FILE, failures)
    clips = sum(sidecar.count for sidecar in sidecars)
    if not clips:
        raise ValueError(
            f"none of the {len(table)} videos could be used, the first because: "
            f"{failures[0]['reason']}; see {output / FAILED_FILE}"
        )
    folders = sorted({str(plan.path.parent) for plan in plans})
    click.echo(
        f"tokenised {clips} of {len(table)} videos ({len(failures)} broken"
        f"{f', see {output / FAILED_FILE}' if failures else ''}) into {len(sidecars)} shards, "
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


def _pool(workers: int) -> Executor:
    """One worker is this process; more are new ones, because a forked torch may hang."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    # An interrupt from the keyboard reaches every process, and is for the parent alone.
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(workers, get_context("spawn"), ignore_interrupt)


def _make_shards(
    pool: Executor, plans: Sequence[ShardPlan], settings: Settings, making: Making, ahead: int
) -> tuple[list[Sidecar], list[dict[str, str]]]:
    """Make what is not finished; all sidecars and all failures, those of earlier runs too."""
    done = {plan.path: sidecar for plan in plans if (sidecar := finished(plan))}
    if done:
        log.info("%d of %d shards are finished and whole; they are kept", len(done), len(plans))
    todo = [plan for plan in plans if plan.path not in done]
    items = chain.from_iterable(plan.items for plan in todo)
    failures = [failure for sidecar in done.values() for failure in sidecar.failed]
    sidecars = list(done.values())
    results = read_ahead(pool, partial(tokenize, settings), items, ahead)
    with progress("tokenising", total=sum(len(plan.items) for plan in todo)) as advance:
        for plan in todo:
            failed: list[dict[str, str]] = []
            clips = _good(results, plan, failed, advance)
            sidecar = _write(plan, clips, making, failed)
            sidecars += [sidecar] if sidecar else []
            failures += failed
    return sidecars, failures


def _good(
    results: Iterator[TokenClip | Failure],
    plan: ShardPlan,
    failed: list[dict[str, str]],
    advance: Callable[[], None],
) -> Iterator[tuple[str, TokenClip]]:
    """Pass on the clips with their keys; failures are noted and left out."""
    for item, result in zip(plan.items, islice(results, len(plan.items)), strict=True):
        advance()
        if isinstance(result, Failure):
            log.warning("skipped: %s", result.reason)
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
