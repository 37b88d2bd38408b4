"""Saving beside training: what was copied is what is saved; a failure is told and tried again."""

import errno
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megavideo.checkpoint.commit import checkpoints_of, list_checkpoints
from megavideo.config.load import load_config
from megavideo.engine import snapshot
from megavideo.engine.build import build_engine
from megavideo.engine.engine import Engine
from megavideo.engine.errors import RunFailed
from megavideo.engine.snapshot import Saver
from megavideo.engine.world import World
from megavideo.train.command import _open_run
from megavideo.train.loop import train
from megavideo.train.metrics import read_rows
from tests.engine.dataset import make_dataset
from tests.engine.support import FINGERPRINT, config, micro_batches, save_checkpoint
from tests.engine.test_nonfinite import assert_same_state


def trained(folder: Path, world: World, steps: int, **run: Any) -> tuple[Engine, Saver]:
    settings = config(folder, run={"directory": str(folder), **run})
    engine = build_engine(settings, world, FINGERPRINT)
    for _ in range(steps):
        engine.train_batch(micro_batches(engine.progress.consumed_samples))
    return engine, Saver(engine, settings, FINGERPRINT)


class SlowDisk:
    """Lets the thread write once it may."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.allow = threading.Event()
        self.write = snapshot.write_part_file
        monkeypatch.setattr(snapshot, "write_part_file", self)

    def __call__(self, path: Path, tensors: dict[str, Tensor]) -> str:
        assert self.allow.wait(30)
        return self.write(path, tensors)


class FullDisk:
    """Has no room for the next `full` files."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.full = math.inf
        self.write = snapshot.write_part_file
        monkeypatch.setattr(snapshot, "write_part_file", self)

    def __call__(self, path: Path, tensors: dict[str, Tensor]) -> str:
        if self.full:
            self.full -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return self.write(path, tensors)


def test_training_goes_on_while_what_was_is_written(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    engine, saver = trained(tmp_path, world, steps=2)
    saver.save()
    for _ in range(2):
        engine.train_batch(micro_batches(engine.progress.consumed_samples))
        assert saver.poll() is None
        assert not list_checkpoints(tmp_path), "not committed before it is written"
    disk.allow.set()
    saved = saver.finish()
    assert saved is not None and saved.problem is None and saved.step == 2
    assert saver.finish() is None
    resumed = build_engine(config(tmp_path), world, FINGERPRINT)
    other, _ = trained(tmp_path / "other", world, steps=2)
    assert_same_state(resumed, other)
    # The second save uses the same host memory again.
    saver.save()
    assert saver.finish().step == 4  # type: ignore[union-attr]
    assert_same_state(build_engine(config(tmp_path), world, FINGERPRINT), engine)


def test_a_finished_write_is_committed_at_the_next_step(world: World, tmp_path: Path) -> None:
    _, saver = trained(tmp_path, world, steps=1)
    saver.save()
    end = time.monotonic() + 20
    while (saved := saver.poll()) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert saved is not None and saved.write_s > 0 and saved.stall_s > 0
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]


def test_a_full_disk_leaves_the_previous_and_the_next_save_works(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, saver = trained(tmp_path, world, steps=1)
    saver.save()
    saver.finish()
    disk = FullDisk(monkeypatch)
    engine.train_batch(micro_batches(8))
    saver.save()
    saved = saver.finish()
    assert saved is not None and saved.problem is not None
    assert "rank 0: " in saved.problem and "No space left on device" in saved.problem
    assert sorted(path.name for path in checkpoints_of(tmp_path).iterdir()) == [
        "latest",
        "step-00000001",
    ]
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(engine, config(tmp_path), FINGERPRINT)
    disk.full = 0
    saver.save()
    assert saver.finish().problem is None  # type: ignore[union-attr]
    assert build_engine(config(tmp_path), world, FINGERPRINT).progress.step == 2


def test_a_folder_that_cannot_be_made_is_a_failed_save(world: World, tmp_path: Path) -> None:
    _, saver = trained(tmp_path, world, steps=1)
    checkpoints_of(tmp_path).write_text("no folder")
    saver.save()
    assert "checkpoints" in saver.finish().problem  # type: ignore[union-attr, operator]


def test_our_own_mistake_while_writing_is_not_hidden(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, tensors: dict[str, Tensor]) -> str:
        raise AssertionError("ours")

    _, saver = trained(tmp_path, world, steps=1)
    monkeypatch.setattr(snapshot, "write_part_file", broken)
    saver.save()
    with pytest.raises(AssertionError, match="ours"):
        saver.finish()


def test_the_newest_and_every_nth_are_kept(world: World, tmp_path: Path) -> None:
    engine, saver = trained(tmp_path, world, steps=0, save_every=1, keep_last=1, keep_every=2)
    for _ in range(5):
        engine.train_batch(micro_batches(engine.progress.consumed_samples))
        saver.save()
        saver.finish()
    assert [folder.name[-1] for folder in list_checkpoints(tmp_path)] == ["5", "4", "2"]


@pytest.mark.parametrize("background", [True, False])
def test_a_run_says_what_a_save_cost_and_stops_when_none_works(
    background: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"recipe.steps": 2, "run.save_every": 1, "run.evaluate_every": 0}
    settings |= {"run.async_save": str(background).lower(), "data.validation": "null"}
    dataset = make_dataset(tmp_path)

    def run(**more: object) -> None:
        assignments = [f"{key}={value}" for key, value in (settings | more).items()]
        train(_open_run(load_config([dataset], assignments), world))

    run()
    folder = tmp_path / "run"
    rows = [row for row in read_rows(folder) if "saved_step" in row]
    assert [row["saved_step"] for row in rows] == [1, 2]
    assert all(row["save_stall_s"] > 0 and row["save_write_s"] > 0 for row in rows)
    disk = FullDisk(monkeypatch)
    with pytest.raises(RunFailed, match=r"could not be saved.* newest checkpoint is step 2"):
        run(**{"recipe.steps": 3})
    with pytest.raises(RunFailed, match="newest checkpoint is step 2"):
        run(**{"recipe.steps": 100})
    rows = [row for row in read_rows(folder) if "loss" in row]
    disk.full = 2
    run(**{"recipe.steps": 3})  # the last save is tried again: no later step would
    assert [path.name[-1] for path in list_checkpoints(folder)] == ["3", "2"]
    assert torch.isfinite(torch.tensor([row["loss"] for row in rows])).all()
