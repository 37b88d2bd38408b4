"""Build kernel sources for the CPU emulator, and run them with their memory watched.

`emulator/runtime.h` says what the emulator checks. A library built here has the same C functions as
the one that nvcc builds, and takes pointers of CPU tensors.
"""

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from torch import Tensor

Schedule = Literal["round_robin", "skewed"]
SCHEDULES: tuple[Schedule, ...] = ("round_robin", "skewed")

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
EMULATOR = Path(__file__).parent / "emulator"
CACHE = ROOT / "build" / "emulator"

FLAGS = (
    *("-std=c++17", "-fPIC", "-DMEGAVIDEO_EMULATE"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-parameter"),
    "-fno-gnu-unique",  # else libraries loaded side by side (mutants) share their statics
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to change stacks
)


class Fault(Exception):
    """A kernel did what PTX leaves undefined."""


class Counters(ctypes.Structure):
    """What launches did since `watch` began; see runtime.h."""

    _names = (
        "mma",
        "ldmatrix",
        "bank_conflicts",
        "copied",
        "loaded",
        "stored",
        "added",
        "barriers",
    )
    _fields_ = [(name, ctypes.c_uint64) for name in (*_names, "shared_bytes")]


def build(sources: Iterable[Path], kernels: Path = KERNELS, optimise: str = "-O2") -> Path:
    """The shared library of `sources` (.cu files that include headers under `kernels`).

    Objects are cached by what the preprocessor makes of their sources. `optimise`: for what runs
    once, -O0 compiles in a fifth of the time.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: _compile(source, kernels, optimise), sources))
    objects.append(_compile(EMULATOR / "runtime.cpp", kernels, "-O2"))
    library = CACHE / f"{_digest(''.join(object.name for object in objects))}.so"
    if not library.exists():
        _run_compiler(library, "-shared", "-Wl,-Bsymbolic", *map(str, objects))
    return library


def _compile(source: Path, kernels: Path, optimise: str) -> Path:
    folders = (source.parent, kernels, kernels / "include", EMULATOR)
    command = [*(f"-I{folder}" for folder in folders), "-x", "c++", str(source)]
    content = subprocess.run(["g++", *FLAGS, "-E", "-P", *command], capture_output=True, check=True)
    digest = _digest(f"{FLAGS}{optimise}{content.stdout.decode()}")
    target = CACHE / f"{source.stem}-{digest}.o"
    if not target.exists():
        _run_compiler(target, optimise, "-c", *command)
    return target


def _run_compiler(target: Path, *arguments: str) -> None:
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    command = ["g++", *FLAGS, "-o", str(temporary), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    temporary.replace(target)


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:24]


class Emulator:
    """A library for the emulator, and control of the emulator inside it."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_fault.restype = ctypes.c_char_p

    def reset(self, schedule: Schedule) -> None:
        """Choose the order in which threads run, and forget regions and counters."""
        self.library.emulator_reset(int(schedule == "skewed"))

    def allow(self, name: str, tensor: Tensor, writable: bool) -> None:
        """Let kernels read (and write, if `writable`) a tensor; the first call forbids all else."""
        elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = ctypes.c_size_t(elements * tensor.element_size())
        start = ctypes.c_void_p(tensor.data_ptr())
        self.library.emulator_region(name.encode(), start, size, int(writable))

    @contextmanager
    def watch(
        self, schedule: Schedule, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> Iterator[Counters]:
        """Launches inside may touch these tensors only; raises Fault at the end if one did more.

        Yields: counters, filled at the end.
        """
        self.reset(schedule)
        for name, tensor in inputs.items():
            self.allow(name, tensor, writable=False)
        for name, tensor in outputs.items():
            self.allow(name, tensor, writable=True)
        counters = Counters()
        yield counters
        self.library.emulator_counters(ctypes.byref(counters))
        fault = self.library.emulator_fault().decode()
        self.reset("round_robin")
        if fault:
            raise Fault(fault)
