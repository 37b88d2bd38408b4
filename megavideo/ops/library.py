"""Find, build and load libmegavideo, the CUDA kernels behind kernels/include/megavideo.h.

Looked for in this order: the file that MEGAVIDEO_LIBRARY names; a build beside the kernel sources
(by `make -C kernels`, or by pip where it found nvcc), if it is of these very sources; such a build
in the user's cache folder, made on first use if there is an nvcc.
"""

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from megavideo.log import log
from megavideo.ops.cache import private_folder

ABI = 2  # MEGAVIDEO_ABI of megavideo.h
NAME = "libmegavideo.so"
STAMP = "sources.sha256"

_PACKAGE = Path(__file__).parents[1]


class LibraryError(RuntimeError):
    """libmegavideo cannot be had; the message says why and what to do."""


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL:
    """The library, ready to be called.

    Raises:
        LibraryError: if there is none and none can be built, or it is of another version.
    """
    path = find()
    try:
        library = ctypes.CDLL(str(path))
        abi = library.megavideo_abi()
    except (OSError, AttributeError) as error:
        raise LibraryError(f"{path} is not a libmegavideo: {error}") from error
    if abi != ABI:
        raise LibraryError(
            f"{path} has interface {abi}, this MegaVideo needs {ABI}; run `make -C kernels` again"
        )
    library.megavideo_error_text.restype = ctypes.c_char_p
    library.megavideo_interval_workspace.restype = ctypes.c_int64
    log.info("CUDA kernels: %s", path)
    return library


def find() -> Path:
    """Path of the library; builds it if need be. Raises LibraryError."""
    named = os.environ.get("MEGAVIDEO_LIBRARY")
    if named:
        if not Path(named).is_file():
            raise LibraryError(f"MEGAVIDEO_LIBRARY={named} does not exist")
        return Path(named)
    folder = _kernel_folder()
    digest = _digest(folder)
    built, stamp = folder / "build" / NAME, folder / "build" / STAMP
    if built.is_file() and stamp.is_file() and stamp.read_text().strip() == digest:
        return built
    return _cached(folder, digest)


def _kernel_folder() -> Path:
    """The kernel sources: inside the installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "kernels", _PACKAGE.parent / "kernels"):
        if (folder / "Makefile").is_file():
            return folder
    raise LibraryError(
        f"no kernel sources in {_PACKAGE}; reinstall MegaVideo, or set MEGAVIDEO_LIBRARY"
    )


def _digest(folder: Path) -> str:
    """Of all that the library is built from; the Makefile leaves the same beside its build."""
    patterns = ("Makefile", "*.cu", "*.cuh", "include/*.h", "local_attention/*.cu*")
    names = {path.relative_to(folder).as_posix() for p in patterns for path in folder.glob(p)}
    content = b"".join((folder / name).read_bytes() for name in sorted(names))
    return hashlib.sha256(content).hexdigest()


def _cached(folder: Path, digest: str) -> Path:
    """The build of `folder`'s sources in the user's cache, for this machine's GPUs."""
    architectures = _architectures()
    try:
        folder_of_builds = private_folder()
    except ValueError as error:
        raise LibraryError(str(error)) from None
    cache = folder_of_builds / f"{digest[:32]}-sm{architectures.replace(' ', '-')}"
    library = cache / NAME
    if not library.is_file():
        nvcc = _nvcc()
        with _locked(cache):
            if not library.is_file():  # Another rank may have built it meanwhile.
                _build(folder, cache, nvcc, architectures)
    return library


def _architectures() -> str:
    """Compute capabilities of the GPUs here, as in "80 90"; without any GPU, those two."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return " ".join(f"{major}{minor}" for major, minor in sorted(found)) or "80 90"


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if nvcc is None:
        raise LibraryError(
            f"no built {NAME}, and no nvcc in PATH or {home}/bin to build it with; install the "
            "CUDA toolkit, or run `make -C kernels` where there is one and set MEGAVIDEO_LIBRARY"
        )
    return nvcc


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """Hold the lock of one build: the processes of a node all want it at once."""
    cache.mkdir(mode=0o700, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, cache: Path, nvcc: str, architectures: str) -> None:
    """Compile into `cache`; the library appears there by a rename at the end."""
    log.info("building CUDA kernels for %s with %s, once", architectures, nvcc)
    objects = cache / "objects"
    options = [f"NVCC={nvcc}", f"BUILD={objects}", f"ARCHITECTURES={architectures}"]
    command = ["make", "-C", str(folder), "-j2", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise LibraryError(f"building the CUDA kernels failed: {' '.join(command)}\n{tail}")
    (objects / NAME).replace(cache / NAME)
    shutil.rmtree(objects)
