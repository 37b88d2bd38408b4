"""Logging and progress, aware of rank and terminal. Imports no torch."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger("megavideo")

PLAIN_INTERVAL_S = 10.0

# Two live displays would draw over each other: a bar inside another becomes a line of the same one.
_display: "Progress | None" = None


def rank() -> int:
    """This process's rank as its launcher says it (torchrun sets RANK), 0 without one."""
    return int(os.environ.get("RANK", "0"))


class StderrHandler(logging.StreamHandler):
    """Writes to what sys.stderr is at the moment: a live bar replaces it to make room for lines."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging(level: int = logging.INFO) -> None:
    """Log to stderr; ranks other than 0 report warnings only, so that a message appears once."""
    handler = StderrHandler()
    prefix = f"[rank {rank()}] " if "RANK" in os.environ else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    handler.setLevel(level if rank() == 0 else max(level, logging.WARNING))
    log.handlers[:] = [handler]  # DeepSpeed's logger is given this handler too
    log.propagate = False
    log.setLevel(handler.level)


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Yield `advance(count=1, note="")`: a bar on a terminal, a line every ten seconds else.

    May be used inside another one.
    """
    if sys.stderr.isatty() and rank() == 0:
        with _bar(title, total) as advance:
            yield advance
    else:
        yield _plain(title, total)


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[..., None]]:
    with _bars() as bars:
        task = bars.add_task(title, total=total, note="")
        try:
            yield lambda count=1, note="": bars.update(task, advance=count, note=note)
        finally:
            bars.remove_task(task)


@contextmanager
def _bars() -> "Iterator[Progress]":
    """The display that is live, or a new one."""
    global _display
    if _display is not None:
        yield _display
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as _display:
        try:
            yield _display
        finally:
            _display = None


def _plain(title: str, total: int | None) -> Callable[..., None]:
    done, reported = 0, time.monotonic()

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, reported
        done += count
        if time.monotonic() - reported >= PLAIN_INTERVAL_S:
            reported = time.monotonic()
            log.info("%s: %d%s %s", title, done, f"/{total}" if total else "", note)

    return advance
