"""Files that are either whole or absent: write beside, fsync, rename."""

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def fsync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_dir(path: Path) -> None:
    """Make renames and new names inside folder `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: Path) -> None:
    """Make `folder` if it is not there, and write a file that has no name into it.

    For programs that work long before they write.

    Raises:
        OSError: naming the folder, if that cannot be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(folder)) from None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` on success and is removed on error.

    For writers that open the file themselves (safetensors, pyarrow, PyAV). An OSError that names no
    file, as that of a full disk, is given `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: some writers choose the format by it.
    # Not by process id: in containers on several nodes the ranks have the same ones.
    temporary = path.with_name(f".{path.stem}.tmp-{secrets.token_hex(6)}{path.suffix}")
    try:
        yield temporary
        fsync_file(temporary)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that becomes `path` when the block ends without an error."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON for people and programs; whole or absent."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")
