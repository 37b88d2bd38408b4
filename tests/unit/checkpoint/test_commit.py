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

from megavideo.checkpoint import commit, files
from megavideo.checkpoint.base import base_path, describe, load_base, store_base
from megavideo.checkpoint.commit import list_checkpoints, new_checkpoint, newest_whole, prune
from megavideo.checkpoint.files import combined_digest, read_tensors, write_tensors
from megavideo.checkpoint.manifest import Manifest, Progress, read_manifest, write_manifest

CONFIG = {"recipe": {"stage": "keyframes"}}


def tensors(step: int) -> dict[str, Tensor]:
    """What the made-up run holds after `step` steps."""
    generator = torch.Generator().manual_seed(step)
    return {
        "a.weight": torch.randn(8, 4, generator=generator),
        "b.bias": torch.randn(5, generator=generator).bfloat16(),
        "c.scale": torch.randn((), generator=generator),
    }


def save(run: Path, step: int) -> Path:
    """Commit a checkpoint of `step`."""
    with new_checkpoint(run, step) as folder:
        entries = {
            "weights.safetensors": write_tensors(folder / "weights.safetensors", tensors(step))
        }
        progress = Progress(step, step, 8 * step)
        write_manifest(folder, Manifest(progress, CONFIG, "data", None, None, entries))
    return list_checkpoints(run)[0]


def assert_holds(folder: Path, step: int) -> None:
    """The checkpoint is the one of `step`, bit for bit."""
    manifest = read_manifest(folder)
    assert manifest.progress.step == step
    read = read_tensors(folder / "weights.safetensors", manifest.files["weights.safetensors"])
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors(step).items())


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
    weights = newest / "weights.safetensors"
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


class Killed(BaseException):
    """Stands for a kill: no handler may tidy up after it."""


def test_a_kill_at_any_file_operation_keeps_the_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing step 2 while step 1 stands, stopped before the n-th rename, fsync or removal."""
    operations = [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (files, "save_file")]
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
        step = read_manifest(newest_whole(run)).progress.step
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
        found = read_manifest(whole).progress.step
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
    held = tensors(7)
    digest = combined_digest(describe(held))
    store_base(tmp_path, held, digest)
    assert all(torch.equal(t, held[n]) for n, t in load_base(tmp_path, digest).items())
    path = base_path(tmp_path, digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="does not have the digest in its name"):
        load_base(tmp_path, digest)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="copy it back"):
        load_base(tmp_path, digest)


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
    assert combined_digest(describe(before)) != combined_digest(describe(after))


@contextmanager
def propagating() -> Iterator[None]:
    """Let caplog see our logger, which does not propagate once the command line set it up."""
    before, commit.log.propagate = commit.log.propagate, True
    try:
        yield
    finally:
        commit.log.propagate = before
