"""What nvcc makes of the kernels: nothing spills, and registers leave room for other blocks."""

import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernels.emulated import KERNELS

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

ARCHITECTURES = ("80", "90")
REGISTERS = 65536  # of a multiprocessor
THREADS = 128

# Blocks on a multiprocessor by kernel and head size: what __launch_bounds__ asks for; where it says
# nothing, enough to keep memory busy.
BLOCKS = {
    "interval_forward": {64: 2, 128: 2},
    "interval_backward_queries": {64: 3, 128: 2},
    "interval_backward_keys": {64: 2, 128: 2},
    "interval_backward_keys_and_queries": {64: 2, 128: 2},
    "interval_backward_begin": {64: 12, 128: 12},
    "interval_backward_end": {64: 12, 128: 12},
    "neighbourhood_forward": {64: 4, 128: 2},
    "neighbourhood_backward_queries": {64: 3, 128: 1},
    "neighbourhood_backward_keys": {64: 3, 128: 1},
}


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel for one architecture; sizes in bytes."""

    name: str
    element: str
    head_size: int
    dropout: bool
    architecture: str
    registers: int
    stack: int
    spills: int
    static_shared: int


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    sources = sorted((KERNELS / "local_attention").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        return [kernel for report in pool.map(_compile, sources) for kernel in _parse(report)]


def _compile(source: Path) -> str:
    """What ptxas says about the kernels of a file."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    options = ["-O3", "-std=c++17", "-Xptxas", "-v", *targets]
    command = ["nvcc", *options, "-c", "-o", "/dev/null", str(source)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


_ENTRY = re.compile(
    r"Compiling entry function '\S*?\d((?:interval|neighbourhood)_[a-z_]+)I"
    r"\S*?\d(Bfloat16|Float16)ELi(64|128)ELb([01])\S*' for 'sm_(\d+)'"
    r".*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r"\s*ptxas info\s*: Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def _parse(report: str) -> Iterator[Kernel]:
    for entry in _ENTRY.finditer(report):
        name, element, size, dropout, architecture, stack, stores, loads, registers, rest = (
            entry.groups()
        )
        shared = re.search(r"(\d+) bytes smem", rest)
        yield Kernel(
            *(name, element, int(size), dropout == "1", architecture, int(registers), int(stack)),
            spills=int(stores) + int(loads),
            static_shared=int(shared[1]) if shared else 0,
        )


def test_every_variant_is_compiled_for_every_architecture(kernels: list[Kernel]) -> None:
    variants = {(k.name, k.element, k.head_size, k.dropout, k.architecture) for k in kernels}
    assert len(variants) == len(kernels) == len(BLOCKS) * 2 * 2 * 2 * len(ARCHITECTURES)


def test_nothing_spills(kernels: list[Kernel]) -> None:
    assert [k for k in kernels if k.spills or k.stack or k.static_shared] == []


def test_registers_leave_room_for_the_blocks(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        blocks = BLOCKS[kernel.name][kernel.head_size]
        per_thread = -(-kernel.registers // 8) * 8  # given out in eights
        assert per_thread * THREADS * blocks <= REGISTERS, kernel
