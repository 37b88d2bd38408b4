"""A folder for code that is built on first use."""

import os
from pathlib import Path


def private_folder() -> Path:
    """One that only this user can write, since code is loaded from it; made if need be.

    Raises:
        ValueError: if others can write to it.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "megavideo"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ValueError(f"others can write to {folder}; run `chmod go-w {folder}` as its owner")
    return folder
