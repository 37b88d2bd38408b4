"""The frozen base of a run: stored once, named by its content, referred to by every checkpoint."""

from pathlib import Path

from megavideo.checkpoint.formats.sharded import WEIGHTS_MANIFEST
from megavideo.checkpoint.manifest import read_manifest
from megavideo.checkpoint.parts import Parts


def base_path(run: Path, digest: str) -> Path:
    """Where a run keeps the base with this digest: a folder of weights like any other of ours."""
    return run / "base" / digest


def open_base(run: Path, digest: str) -> Parts:
    """The base named `digest` in a run's folder.

    Raises:
        FileNotFoundError, ValueError: if it is missing, damaged or another.
    """
    folder = base_path(run, digest)
    if not (folder / WEIGHTS_MANIFEST).is_file():
        raise FileNotFoundError(
            f"the frozen base {folder} is missing; checkpoints refer to it: copy it back"
        )
    manifest = read_manifest(folder / WEIGHTS_MANIFEST)
    if manifest.content != digest:
        raise ValueError(
            f"{folder} holds another base, {manifest.content}; copy the one in its name back"
        )
    return Parts(folder, manifest)
