"""Rows, speeds and held-out means."""

import errno
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megavideo.engine.world import World
from megavideo.log import log
from megavideo.train.evaluate import frame_accuracies, held_out_loss
from megavideo.train.metrics import Metrics, read_rows
from megavideo.train.speed import Speed, peak_tflops
from megavideo.train.stop import stop_on_signals
from tests.engine.support import batch_at, config


def test_rows_of_steps_that_will_be_done_again_are_dropped(tmp_path: Path) -> None:
    first = Metrics(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    second = Metrics(tmp_path, 2)
    second.write(3, {"loss": 30.0})
    second.close()
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


class FullDisk(io.FileIO):
    """Takes half of what it is given, then nothing, as long as `full`."""

    full = True
    took = False

    def write(self, data: Any) -> int:
        if self.full and self.took:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.took = self.full
        content = bytes(data)
        return super().write(content[: len(content) // 2 if self.full else None]) or 0


def test_rows_wait_until_a_full_disk_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, 0)
    metrics.write(1, {"loss": 1.0})
    disk = FullDisk(str(tmp_path / "metrics.jsonl"), "ab")
    metrics._file = disk
    log.propagate = True
    for step in (2, 3):
        metrics.write(step, {"loss": float(step)})
        assert [row["step"] for row in read_rows(tmp_path)] == [1], "and no half of a line"
    assert "metrics of step 2 could not be written: [Errno 28]" in caplog.text
    disk.full = False
    metrics.write(4, {"loss": 4.0})
    metrics.close()
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]


def test_mfu_is_left_out_where_the_peak_is_unknown(tmp_path: Path) -> None:
    unknown = Speed(config(tmp_path), world_size=1).figures(8, 2.0)
    assert "mfu" not in unknown
    assert unknown["clips_per_s"] == 4
    assert unknown["tokens_per_s"] == 4 * (4 + 3 * 4)
    known = config(tmp_path, run={"directory": "x", "peak_tflops": 0.5})
    assert peak_tflops(known) == 0.5
    figures = Speed(known, world_size=2).figures(8, 2.0)
    assert figures["mfu"] == pytest.approx(figures["tflops"] / (2 * 0.5))
    assert figures["peak_tflops"] == 0.5


def test_recomputation_counts_in_hfu_and_frozen_weights_in_the_naive_mfu(tmp_path: Path) -> None:
    def figures(recompute: str) -> dict[str, float]:
        settings = config(
            tmp_path,
            run={"directory": "x", "peak_tflops": 0.5},
            parallel={"recompute": recompute},
        )
        return Speed(settings, world_size=1).figures(8, 2.0)

    kept, again = figures("none"), figures("layer")
    assert kept["mfu"] == again["mfu"] < kept["hfu"] < again["hfu"]
    assert kept["mfu_6n"] == again["mfu_6n"] > kept["mfu"]


@pytest.fixture
def alone() -> World:
    """A world whose sums are its own values."""

    class Alone(World):
        def total(self, values: torch.Tensor) -> torch.Tensor:
            return values

    return Alone(0, 1, torch.device("cpu"))


def test_every_held_out_sample_counts_once(alone: World) -> None:
    def frame_losses(batch: object) -> torch.Tensor:
        first = batch.text_length[0].item()  # type: ignore[attr-defined]
        return torch.tensor([first, 10.0 * first])

    def constant(length: int, count: int) -> tuple[object, int]:
        batch = batch_at(range(max(count, 1)))
        batch.text_length.fill_(length)
        return batch, count

    batches = [constant(1, 3), constant(2, 1), constant(4, 0)]
    held_out = held_out_loss(frame_losses, batches, alone)  # type: ignore[arg-type]
    assert held_out.samples == 4
    assert held_out.frame_losses == (1.25, 12.5)
    assert held_out.loss == pytest.approx((1.25 + 12.5) / 2)


def test_accuracy_is_the_share_of_tokens_whose_likeliest_code_is_right() -> None:
    image = torch.tensor([[[9, 9], [0, 1], [2, 0]], [[9, 9], [1, 1], [2, 2]]])  # [B, F, N]
    said = torch.tensor([[[0, 1], [1, 1]], [[1, 0], [2, 2]]])  # of frames 1 and 2
    logits = torch.nn.functional.one_hot(said, 3).float()
    assert frame_accuracies(logits, image, (1, 2)).tolist() == [0.75, 0.5]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A job that was started in the background of a script has inherited an ignored SIGINT."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("interruptible")
def test_the_first_signal_asks_and_the_second_acts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
