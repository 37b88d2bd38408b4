"""Metrics of a run: one JSON line a row in RUN/metrics.jsonl, and the same in RUN/tensorboard."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from megavideo.files import atomic_write

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
        self._file = path.open("a")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, row: Row) -> None:
        """Append `row`, which took place at `step`."""
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        self._file.close()
        self._board.close()


def by_frame(name: str, frames: Sequence[int], losses: Sequence[float]) -> Row:
    """`NAME_frame_K` for each frame that carries loss."""
    return {f"{name}_frame_{k}": loss for k, loss in zip(frames, losses, strict=True)}


def read_rows(run: Path) -> list[Row]:
    """The rows of a run, oldest first."""
    return [json.loads(line) for line in (run / FILE).read_text().splitlines()]


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
