"""Checkpoints of a run, each a folder that is whole or absent; `latest` names the one to resume.

RUN/checkpoints/step-00000020/{weights.safetensors, optimizer.safetensors, manifest.json}
RUN/checkpoints/latest
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megavideo.checkpoint.files import verify_tensors
from megavideo.checkpoint.manifest import read_manifest
from megavideo.files import atomic_write, fsync_dir
from megavideo.log import log

LATEST = "latest"
# Folders being written or removed; a kill may leave one behind, the next commit sweeps it away.
TEMPORARY = ".tmp-"


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / "checkpoints"


def list_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints, newest first; not checked."""
    return sorted(checkpoints_of(run).glob("step-*"), reverse=True)


@contextmanager
def new_checkpoint(run: Path, step: int) -> Iterator[Path]:
    """Yield a temporary folder to fill (the manifest last); it becomes the checkpoint of `step`.

    The caller's files must be fsynced. A kill at any moment leaves the older checkpoints and
    `latest` as they were.
    """
    parent = checkpoints_of(run)
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    name = f"step-{step:08d}"
    folder = parent / f"{TEMPORARY}{name}"
    folder.mkdir()
    yield folder
    fsync_dir(folder)
    _discard(parent / name)
    os.replace(folder, parent / name)
    fsync_dir(parent)
    with atomic_write(parent / LATEST) as file:
        file.write(f"{name}\n".encode())


def newest_whole(run: Path) -> Path | None:
    """The checkpoint that `latest` names, or if that is damaged the newest whole one.

    Every tensor is read and checked. Whatever is passed over is logged with the reason.

    Raises:
        ValueError: if there are checkpoints and all are damaged.
    """
    candidates = _candidates(run)
    for folder in candidates:
        try:
            verify_checkpoint(folder)
        except (ValueError, OSError) as error:
            log.warning("passing over checkpoint %s: %s", folder.name, error)
        else:
            return folder
    if candidates:
        raise ValueError(
            f"every checkpoint in {checkpoints_of(run)} is damaged; restore one from a backup, or "
            "train into another run.directory"
        )
    return None


def verify_checkpoint(folder: Path) -> None:
    """Check a checkpoint's manifest and every tensor that it names.

    Raises:
        ValueError, FileNotFoundError: saying what is damaged or missing.
    """
    for file, entries in read_manifest(folder).files.items():
        verify_tensors(folder / file, entries)


def condemned(run: Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Checkpoints but the newest `keep_last`, those of steps that `keep_every` divides, and the
    one that `latest` names."""
    latest = _named_latest(run)
    return [
        folder
        for folder in list_checkpoints(run)[keep_last:]
        if folder != latest and not (keep_every and step_of(folder) % keep_every == 0)
    ]


def prune(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove the checkpoints that are `condemned`."""
    for folder in condemned(run, keep_last, keep_every):
        _discard(folder)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def _candidates(run: Path) -> list[Path]:
    everything = list_checkpoints(run)
    latest = _named_latest(run)
    if latest is None or latest not in everything:
        if everything:
            log.warning("%s/%s names no checkpoint", checkpoints_of(run), LATEST)
        return everything
    return [latest, *(folder for folder in everything if folder != latest)]


def _named_latest(run: Path) -> Path | None:
    path = checkpoints_of(run) / LATEST
    if not path.is_file():
        return None
    return checkpoints_of(run) / path.read_text(errors="replace").strip()


def _discard(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that none is ever seen half removed."""
    if folder.exists():
        condemned = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        os.replace(folder, condemned)
        shutil.rmtree(condemned)


def _sweep(parent: Path) -> None:
    for leftover in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
