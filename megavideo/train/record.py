"""What is written down about a run while it trains: steps become rows, pauses do not count."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megavideo.config.schema import Config
from megavideo.engine.engine import StepResult
from megavideo.engine.snapshot import Saved
from megavideo.log import log
from megavideo.train.evaluate import HeldOut
from megavideo.train.metrics import Metrics, Row, by_frame
from megavideo.train.speed import Speed, peak_memory_gib


class Recorder:
    """Collects steps and writes a row about them now and then; only rank 0 writes.

    Args:
        frames: numbers of the frames that carry loss.
        step: where the run stands.
    """

    def __init__(
        self, config: Config, frames: Sequence[int], rank: int, world_size: int, step: int
    ):
        self._metrics = Metrics(Path(config.run.directory), step) if rank == 0 else None
        self._frames = frames
        self._speed = Speed(config, world_size)
        self._begin_row()

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self._results.append(result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent here (evaluating, saving) is not training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - started

    def write_steps(self, step: int, data_counts: Row) -> None:
        """Write a row about the steps since the last one, and about the data since the start."""
        if self._metrics:
            self._metrics.write(step, self._row() | data_counts)
        self._begin_row()

    def write_held_out(self, step: int, held_out: HeldOut) -> None:
        """Write a row about an evaluation."""
        if self._metrics:
            frames = by_frame("held_out_loss", self._frames, held_out.frame_losses)
            self._metrics.write(step, {"held_out_loss": held_out.loss, **frames})

    def write_saved(self, step: int, saved: Saved) -> None:
        """Write a row about a checkpoint, as of the step at which it was committed."""
        if self._metrics and saved.problem is None:
            times = {"save_stall_s": saved.stall_s, "save_write_s": saved.write_s}
            self._metrics.write(step, {"saved_step": saved.step, **times})
            told = "saved step %d: %.2f s of training lost, %.2f s of writing"
            log.info(told, saved.step, saved.stall_s, saved.write_s)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._metrics:
            self._metrics.close()

    def _begin_row(self) -> None:
        self._results: list[StepResult] = []
        self._started = time.perf_counter()
        self._paused = 0.0

    def _row(self) -> Row:
        seconds = time.perf_counter() - self._started - self._paused
        results = self._results
        return {
            **self._means([result for result in results if not result.skipped]),
            "learning_rate": results[-1].learning_rate,
            **({"loss_scale": scale} if (scale := results[-1].loss_scale) else {}),
            "skipped": sum(result.skipped for result in results),
            **self._speed.figures(sum(result.samples for result in results), seconds),
            "data_wait_share": sum(result.data_wait_s for result in results) / seconds,
            "memory_gib": peak_memory_gib(),
        }

    def _means(self, results: list[StepResult]) -> Row:
        """Means of what was learned from; nothing if every step was skipped."""
        if not results:
            return {}
        by_step = zip(*(result.frame_losses for result in results), strict=True)
        return {
            "loss": _mean([result.loss for result in results]),
            **by_frame("loss", self._frames, [_mean(losses) for losses in by_step]),
            "grad_norm": _mean([result.grad_norm for result in results]),
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
