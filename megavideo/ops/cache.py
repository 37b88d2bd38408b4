"""Where code goes that is built on first use: libmegavideo, and what torch.compile makes."""

import os
from pathlib import Path

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def private_folder() -> Path:
    """A folder that only this user can write, since code is loaded from it; made if need be.

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


def keep_code_private() -> None:
    """Have torch.compile keep code (Triton's too) in the user's cache, or where the user said.

    Torch's default is in the shared /tmp, where anyone may have made it first, and code is loaded
    from it. Importing DeepSpeed is enough for torch to have set that.

    Raises:
        ValueError: if others can write to the user's cache folder.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    default = default_cache_dir()
    if os.environ.get(CACHE_VARIABLE, default) == default:
        os.environ[CACHE_VARIABLE] = str(private_folder() / "inductor")
