"""Metrics of a run: one JSON line a row in RUN/metrics.jsonl, and the same in RUN/tensorboard."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megavideo.files import atomic_write
from megavideo.log import log

FILE = "metrics.jsonl"
Row = dict[str, float]


class Metrics:
    """Writes rows; only rank 0 has one.

    Args:
        run: the run's folder.
        step: where the run stands. Rows of later steps, written before a crash by steps that will
            be done again, are dropped.
    """

    def __init__(self, run: Path, step: int):
        path = run / FILE
        if path.exists():
            _keep_until(path, step)
        self._file = path.open("ab", buffering=0)
        self._pending = b""
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, row: Row) -> None:
        """Append `row`, which took place at `step`.

        A disk without room costs rows, not the run: those of the file are written once there is
        room again, those of TensorBoard are not.
        """
        self._pending += json.dumps({"step": step, **row}).encode() + b"\n"
        with _told(f"metrics of step {step}"):
            self._write_pending()
        with _told(f"TensorBoard's values of step {step}"):
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        with _told("the last metrics"), self._file:
            self._write_pending()
        with _told("TensorBoard's last values"):
            self._board.close()

    def _write_pending(self) -> None:
        """All or nothing: half a line would spoil the file."""
        end = os.fstat(self._file.fileno()).st_size
        left = memoryview(self._pending)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            self._file.truncate(end)
            raise
        self._pending = b""


def by_frame(name: str, frames: Sequence[int], losses: Sequence[float]) -> Row:
    """`NAME_frame_K` for each frame that carries loss."""
    return {f"{name}_frame_{k}": loss for k, loss in zip(frames, losses, strict=True)}


def read_rows(run: Path) -> list[Row]:
    """The rows of a run, oldest first."""
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


@contextmanager
def _told(what: str) -> Iterator[None]:
    """An error of the disk is logged, and no more."""
    try:
        yield
    except OSError as error:
        log.error("%s could not be written: %s", what, error)


def _keep_until(path: Path, step: int) -> None:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the last line of a killed run may be half written
            continue
    with atomic_write(path) as file:
        file.writelines(kept)
