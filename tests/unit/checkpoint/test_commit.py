"""Whatever happens to a run's folder, it either loads what was saved or says what is damaged."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megavideo.checkpoint import commit
from megavideo.checkpoint.base import base_path, open_base
from megavideo.checkpoint.commit import (
    abandon,
    begin,
    checkpoints_of,
    list_checkpoints,
    newest_whole,
    prune,
)
from megavideo.checkpoint.files import combined_digest
from megavideo.checkpoint.formats.run import RunReader
from megavideo.checkpoint.manifest import MANIFEST, Progress, Training, read_training, write_sealed
from megavideo.checkpoint.parts import open_parts
from tests.unit.checkpoint.samples import entries_of, weights, write_checkpoint, write_parts

CONFIG = {"recipe": {"stage": "keyframes"}}
MIXTURE = "layers.0.attention.mixture"
WEIGHTS = "layers.0.tp-00-of-01.safetensors"


def tensors(step: int) -> dict[str, Tensor]:
    """What the made-up run holds after `step` steps."""
    generator = torch.Generator().manual_seed(step)
    return {
        "embedding.frame_position": torch.randn(8, 4, generator=generator),
        "layers.0.attention.temporal.dense.bias": torch.randn(5, generator=generator).bfloat16(),
        MIXTURE: torch.randn(4, generator=generator),
        f"{MIXTURE}.exp_avg": torch.randn(4, generator=generator),
    }


def save(run: Path, step: int) -> Path:
    """Commit a checkpoint of `step`."""
    training = Training(Progress(step, step, 8 * step), CONFIG, "data", None, None)
    return write_checkpoint(run, tensors(step), training)


def assert_holds(folder: Path, step: int) -> None:
    """The checkpoint is the one of `step`, bit for bit."""
    assert read_training(folder).progress.step == step
    parts = open_parts(folder / MANIFEST)
    assert all(torch.equal(parts.read(name), tensor) for name, tensor in tensors(step).items())


def test_a_checkpoint_reads_back_bit_for_bit(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert_holds(newest_whole(tmp_path), 3)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) is None


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    chosen = random.Random(0)
    for _ in range(200):
        path = chosen.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        position, bit = chosen.randrange(len(content)), chosen.randrange(8)
        content[position] ^= 1 << bit
        healthy = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            newest_whole(tmp_path)
        path.write_bytes(healthy)
    assert newest_whole(tmp_path) == folder


@pytest.mark.parametrize("damage", ["truncate", "delete tensors", "delete manifest"])
def test_a_damaged_checkpoint_is_passed_over_aloud(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    weights = newest / WEIGHTS
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "delete tensors":
        weights.unlink()
    else:
        (newest / "manifest.json").unlink()
    caplog.set_level("WARNING", logger="megavideo")
    with propagating():
        assert_holds(newest_whole(tmp_path), 1)
    assert "passing over checkpoint step-00000002" in caplog.text


def test_another_versions_checkpoint_is_refused_by_its_format(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = checkpoints_of(tmp_path) / "step-00000001"
    folder.mkdir(parents=True)
    write_sealed(folder / MANIFEST, "megavideo-checkpoint-1", {"files": {}})
    with propagating(), pytest.raises(ValueError, match="another version's, as said above"):
        newest_whole(tmp_path)
    assert "format 'megavideo-checkpoint-1'; this version reads only" in caplog.text


def test_latest_may_be_set_back_by_hand(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")
    assert_holds(newest_whole(tmp_path), 1)
    save(tmp_path, 2)
    assert_holds(newest_whole(tmp_path), 2)


def test_old_checkpoints_go_but_never_the_latest(tmp_path: Path) -> None:
    for step in range(1, 6):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002\n")
    prune(tmp_path, keep_last=2)
    assert [f.name[-1] for f in list_checkpoints(tmp_path)] == ["5", "4", "2"]


def test_a_copy_under_another_name_is_left_alone(tmp_path: Path) -> None:
    kept = checkpoints_of(tmp_path) / "step-00000001-good"
    shutil.copytree(save(tmp_path, 1), kept)
    for step in (2, 3, 4):
        save(tmp_path, step)
        prune(tmp_path, keep_last=1, keep_every=2)
    assert [f.name[-1] for f in list_checkpoints(tmp_path)] == ["4", "2"]
    assert kept.is_dir()


def test_a_checkpoint_behind_a_link_is_read_and_removed_and_hinders_no_save(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    moved = save(run, 1).rename(elsewhere)
    (checkpoints_of(run) / "step-00000001").symlink_to(moved)
    assert_holds(newest_whole(run), 1)
    for step in (2, 3):
        begin(run, step)  # sweeps what stands in the way
        abandon(run, step)
        save(run, step)
        prune(run, keep_last=1)
    assert [f.name[-1] for f in list_checkpoints(run)] == ["3"]
    assert (moved / MANIFEST).is_file(), "what a link names is not the run's to remove"


def test_leftovers_that_cannot_be_removed_hinder_no_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (checkpoints_of(tmp_path) / ".tmp-note").write_text("no folder")
    begin(tmp_path, 2)


@pytest.mark.parametrize("link", ["checkpoints", "checkpoint", "run", "to a checkpoint"])
def test_a_checkpoints_base_is_its_runs_whatever_is_a_link(link: str, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder = save(run, 1)
    moved = {"checkpoints": folder.parent, "checkpoint": folder, "run": run}.get(link)
    if moved:
        moved.rename(elsewhere)
        moved.symlink_to(elsewhere)
    else:
        (tmp_path / "newest").symlink_to(folder)
        folder = tmp_path / "newest"
    reader = RunReader(folder)
    assert (reader.path / "checkpoints").samefile(run / "checkpoints")
    assert all((reader.path / file).is_file() for file in reader.files)


class Killed(BaseException):
    """Stands for a kill: no handler may tidy up after it."""


def test_a_kill_at_any_file_operation_keeps_the_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing step 2 while step 1 stands, stopped before the n-th rename, fsync or removal."""
    operations = [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (commit, "write_manifest")]
    completed = False
    moment = 0
    while not completed:
        run = tmp_path / str(moment)
        save(run, 1)
        save(run, 2)
        countdown = iter(range(moment, -1, -1))
        with monkeypatch.context() as patch:
            for module, name in operations:
                patch.setattr(module, name, _killed_at_zero(getattr(module, name), countdown))
            try:
                save(run, 2)
                prune(run, keep_last=1)
                completed = True
            except Killed:
                pass
        step = read_training(newest_whole(run)).progress.step
        assert step in (1, 2)
        save(run, 3)
        assert_holds(newest_whole(run), 3)
        assert not list((run / "checkpoints").glob(".tmp-*")), "leftovers are swept away"
        moment += 1
    assert moment > 8, "the operations were not intercepted"


def _killed_at_zero(operation, countdown):  # type: ignore[no-untyped-def]
    def call(*args, **kwargs):  # type: ignore[no-untyped-def]
        if next(countdown, 1) == 0:
            raise Killed
        return operation(*args, **kwargs)

    return call


def test_a_real_kill_loses_no_saved_step(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    chosen = random.Random(1)
    reached = 0
    for _ in range(8):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_save_forever, args=(tmp_path, reached, sender))
        process.start()
        reached = receiver.recv()
        time.sleep(chosen.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        while receiver.poll():
            try:
                reached = receiver.recv()
            except EOFError:
                break
        whole = newest_whole(tmp_path)
        found = read_training(whole).progress.step
        assert found >= reached
        assert_holds(whole, found)
        reached = found
    assert reached > 8


def _save_forever(run: Path, step: int, sender) -> None:  # type: ignore[no-untyped-def]
    while True:
        step += 1
        save(run, step)
        prune(run, keep_last=2)
        sender.send(step)


def test_the_frozen_base_is_named_by_its_content(tmp_path: Path) -> None:
    held = weights("image")
    digest = combined_digest(entries_of(held))
    folder = base_path(tmp_path, digest)
    write_parts(folder, held, 2)
    base = open_base(tmp_path, digest)
    assert all(torch.equal(base.read(name), tensor) for name, tensor in held.items())
    path = folder / "layers.1.tp-01-of-02.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    damaged = open_base(tmp_path, digest)
    with pytest.raises(ValueError, match="is damaged"):
        damaged.read("layers.1.mlp.up.weight")
    base_path(tmp_path, "0123").parent.mkdir(exist_ok=True)
    folder.rename(base_path(tmp_path, "0123"))
    with pytest.raises(ValueError, match=f"holds another base, {digest}"):
        open_base(tmp_path, "0123")
    with pytest.raises(FileNotFoundError, match="copy it back"):
        open_base(tmp_path, digest)


@pytest.mark.parametrize("change", ["name", "type", "shape", "content"])
def test_the_digest_depends_on(change: str) -> None:
    before, after = {"a": torch.zeros(2, 3)}, {"a": torch.zeros(2, 3)}
    if change == "name":
        after = {"b": torch.zeros(2, 3)}
    elif change == "type":
        after["a"] = torch.zeros(2, 3, dtype=torch.int32)
    elif change == "shape":
        after["a"] = torch.zeros(3, 2)
    else:
        after["a"][0, 0] = -0.0
    assert combined_digest(entries_of(before)) != combined_digest(entries_of(after))


@contextmanager
def propagating() -> Iterator[None]:
    """Let caplog see our logger, which does not propagate once the command line set it up."""
    before, commit.log.propagate = commit.log.propagate, True
    try:
        yield
    finally:
        commit.log.propagate = before
