"""Checkpoints of a run, each a folder that is whole or absent; `latest` names the one to resume.

RUN/checkpoints/step-00000020/   a folder of parts (parts.py); manifest.json was written last
RUN/checkpoints/latest           "step-00000020"
"""

import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megavideo.checkpoint.manifest import MANIFEST, Manifest, write_manifest
from megavideo.checkpoint.parts import files_of, open_parts
from megavideo.files import atomic_write, fsync_dir
from megavideo.log import log, rank

CHECKPOINTS = "checkpoints"
LATEST = "latest"
NAME = re.compile(r"step-\d{8,}")
# Folders being written or removed; a kill may leave one behind, the next commit sweeps it away.
TEMPORARY = ".tmp-"
THREADS = 4  # files that are checked at a time


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run / CHECKPOINTS


def list_checkpoints(run: Path) -> list[Path]:
    """Committed checkpoints, newest first; not checked. A copy under another name is none."""
    found = checkpoints_of(run).glob("step-*")
    return sorted((folder for folder in found if NAME.fullmatch(folder.name)), reverse=True)


def in_its_run(checkpoint: Path) -> Path:
    """A checkpoint's folder as RUN/checkpoints/NAME, however it is named: RUN has its base.

    A link to a checkpoint is followed. In a run, `checkpoints` and what is in it may themselves be
    links to other disks, and are not.
    """
    folder = checkpoint.absolute()
    return folder if folder.parent.name == CHECKPOINTS else folder.resolve()


def folder_name(step: int) -> str:
    """Name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def temporary(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is one."""
    return checkpoints_of(run) / f"{TEMPORARY}{folder_name(step)}"


def begin(run: Path, step: int) -> None:
    """Make the temporary folder of the checkpoint of `step`; what a kill left of others goes."""
    parent = checkpoints_of(run)
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    temporary(run, step).mkdir()


def commit(run: Path, step: int, manifest: Manifest) -> None:
    """Make the temporary folder, whose files are all there and fsynced, the checkpoint of `step`.

    A kill at any moment leaves the older checkpoints and `latest` as they were.
    """
    parent, folder = checkpoints_of(run), temporary(run, step)
    check_written(folder, manifest)
    write_manifest(folder / MANIFEST, manifest)
    fsync_dir(folder)
    _discard(parent / folder_name(step))
    os.replace(folder, parent / folder_name(step))
    fsync_dir(parent)
    with atomic_write(parent / LATEST) as file:
        file.write(f"{folder_name(step)}\n".encode())


def check_written(folder: Path, manifest: Manifest) -> None:
    """Raises: ValueError if a file is not here that another rank, as it says, has written."""
    for file in files_of(manifest.tensors, manifest.tp):
        assert file in manifest.seals, f"no rank has written {file}"
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder / file} was written by another rank, but is not here; run.directory must "
                "lie on a file system that all ranks share"
            )


def abandon(run: Path, step: int) -> None:
    """Remove the temporary folder of a checkpoint that could not be written."""
    shutil.rmtree(temporary(run, step), ignore_errors=True)


def newest_whole(run: Path) -> Path | None:
    """The checkpoint that `latest` names, or if that is damaged the newest whole one.

    Everything is read and checked. Whatever is passed over is logged with the reason.

    Raises:
        ValueError: if there are checkpoints and all are damaged.
    """
    return first_whole(run, candidates_of(run), damage)


def first_whole(
    run: Path, candidates: list[Path], problem: Callable[[Path], str | None]
) -> Path | None:
    """The first of a run's `candidates` without a `problem`, None if there are no candidates.

    Raises:
        ValueError: if all have one.
    """
    for folder in candidates:
        text = problem(folder)
        if text is None:
            return folder
        if rank() == 0:
            log.warning("passing over checkpoint %s: %s", folder.name, text)
    if candidates:
        raise ValueError(
            f"every checkpoint in {checkpoints_of(run)} is damaged, or another version's, as said "
            "above; restore one from a backup, or train into another run.directory"
        )
    return None


def verify_checkpoint(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Read and check a checkpoint, or the `share`-th of `shares` parts of its files.

    Raises:
        ValueError, FileNotFoundError: saying what is damaged or missing.
    """
    parts = open_parts(folder / MANIFEST)
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(parts.verify_file, parts.part_files[share::shares]):
            pass


def damage(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What `verify_checkpoint` finds damaged or missing, None if nothing is.

    Raises:
        OSError: if the files cannot be read now, which does not make them damaged.
    """
    try:
        verify_checkpoint(folder, share, shares)
    except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return str(error)
    return None


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


def candidates_of(run: Path) -> list[Path]:
    """A run's checkpoints in the order in which to try them: `latest`, then from the newest."""
    everything = list_checkpoints(run)
    latest = _named_latest(run)
    if latest is None or latest not in everything:
        if everything:
            log.warning("%s/%s names no checkpoint", checkpoints_of(run), LATEST)
        return everything
    if latest != everything[0]:
        older = checkpoints_of(run) / LATEST
        log.warning("%s names %s, not the newest, %s", older, latest.name, everything[0].name)
    return [latest, *(folder for folder in everything if folder != latest)]


def _named_latest(run: Path) -> Path | None:
    path = checkpoints_of(run) / LATEST
    if not path.is_file():
        return None
    return checkpoints_of(run) / path.read_text(errors="replace").rstrip("\n")


def _discard(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that none is ever seen half removed."""
    if folder.exists():
        condemned = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        os.replace(folder, condemned)
        _remove(condemned)


def _sweep(parent: Path) -> None:
    for leftover in parent.glob(f"{TEMPORARY}*"):
        try:
            _remove(leftover)
        except OSError as error:  # takes room, but is in no save's way
            log.warning("%s was not removed: %s", leftover, error)


def _remove(folder: Path) -> None:
    """Remove a folder, or a link that somebody put in its place; not what the link names."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
