"""A library for ops/ whose kernels run in the emulator and may touch their own tensors only.

Stands where the library loaded from nvcc's build would stand, so the callers under test are the
real ones. Outputs start as NaN.
"""

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.kernels.emulated import Counters, Emulator, Fault, Schedule

TILE = 64
NAN_BYTE = 0xFF
FAULT = 1000  # kFault of emulator/runtime.h


class Region(NamedTuple):
    """What a kernel may follow a pointer to; outputs are written."""

    name: str
    pointer: int | None
    size: int
    is_output: bool = False


class WatchedLibrary:
    """Has the functions of libmegavideo; `schedule` and `counters` are those of the last call."""

    def __init__(self, emulator: Emulator, schedule: Schedule):
        self.emulator = emulator
        self.schedule = schedule
        self.counters = Counters()
        self.megavideo_error_text = emulator.library.megavideo_error_text
        self.megavideo_error_text.restype = ctypes.c_char_p

    def megavideo_interval_forward(self, problem: Any, stream: None) -> int:
        regions = _interval_regions(problem._obj, ("out", "lse"), ())
        return self._call("megavideo_interval_forward", problem, regions)

    def megavideo_interval_workspace(self, problem: Any) -> int:
        function = self.emulator.library.megavideo_interval_workspace
        function.restype = ctypes.c_int64
        return int(function(problem))

    def megavideo_interval_backward(self, problem: Any, stream: None) -> int:
        outputs = ("delta", "grad_image", "grad_text", "workspace")
        regions = _interval_regions(problem._obj, outputs, ("out", "lse", "grad_out"))
        return self._call("megavideo_interval_backward", problem, regions)

    def megavideo_neighbourhood_forward(self, problem: Any, stream: None) -> int:
        regions = _neighbourhood_regions(problem._obj, is_backward=False)
        return self._call("megavideo_neighbourhood_forward", problem, regions)

    def megavideo_neighbourhood_backward(self, problem: Any, stream: None) -> int:
        regions = _neighbourhood_regions(problem._obj, is_backward=True)
        return self._call("megavideo_neighbourhood_backward", problem, regions)

    def _call(self, function: str, problem: Any, regions: Iterator[Region]) -> int:
        self.emulator.reset(self.schedule)
        for region in regions:
            self._allow(region)
        status: int = getattr(self.emulator.library, function)(problem, None)
        self.emulator.library.emulator_counters(ctypes.byref(self.counters))
        if status == FAULT:
            raise Fault(self.emulator.library.emulator_fault().decode())
        return status

    def _allow(self, region: Region) -> None:
        if region.pointer is None:
            return
        if region.is_output:
            ctypes.memset(region.pointer, NAN_BYTE, region.size)
        pointer, size = ctypes.c_void_p(region.pointer), ctypes.c_size_t(region.size)
        allow = self.emulator.library.emulator_region
        allow(region.name.encode(), pointer, size, int(region.is_output))


def _interval_regions(
    p: Any, outputs: tuple[str, ...], inputs: tuple[str, ...]
) -> Iterator[Region]:
    layout = ("slots", "begin", "end", "bounds", "seen_by", "text_length")
    sizes = _interval_bytes(p)
    for name in (*layout, "image_qkv", "text_kv", *inputs, *outputs):
        yield Region(name, getattr(p, name), sizes[name], name in outputs)


def _interval_bytes(p: Any) -> dict[str, int]:
    """How far each pointer of a problem may be followed."""
    tiles = p.places // TILE
    rows = p.batch * p.image_slots * p.heads
    words = {"slots": p.places, "begin": p.places, "end": p.places, "lse": rows, "delta": rows}
    words["workspace"] = p.batch * p.heads * p.places * p.head_size
    words |= {"bounds": 4 * tiles, "seen_by": 2 * tiles, "text_length": 2 * p.batch}
    halves = {name: rows * p.head_size for name in ("out", "grad_out")}
    halves["grad_image"] = 3 * rows * p.head_size
    halves["grad_text"] = 2 * p.batch * p.text_slots * p.heads * p.head_size
    halves["image_qkv"] = _extent(p, p.image, p.image_slots, 3)
    halves["text_kv"] = _extent(p, p.text, p.text_slots, 2)
    return {name: 4 * n for name, n in words.items()} | {name: 2 * n for name, n in halves.items()}


def _neighbourhood_regions(p: Any, is_backward: bool) -> Iterator[Region]:
    queries = p.rows * p.columns
    rows = p.batch * queries * p.heads
    yield Region("text_length", p.text_length, 8 * p.batch)
    yield Region("query", p.query, 2 * _extent(p, p.query_strides, queries, 1))
    if p.text_slots:
        yield Region("text_kv", p.text_kv, 2 * _extent(p, p.text_strides, p.text_slots, 2))
    for i, grid in enumerate(p.grids[: p.num_grids]):
        keys = grid.rows * grid.columns
        yield Region(f"grids[{i}].kv", grid.kv, 2 * _extent(p, grid.strides, keys, 2))
        if is_backward:
            size = 4 * p.batch * keys * p.heads * p.head_size
            yield Region(f"grids[{i}].grad_kv", grid.grad_kv, size, is_output=True)
    yield Region("out", p.out, 2 * rows * p.head_size, not is_backward)
    yield Region("lse", p.lse, 4 * rows, not is_backward)
    if is_backward:
        yield Region("grad_out", p.grad_out, 2 * rows * p.head_size)
        yield Region("delta", p.delta, 4 * rows, is_output=True)
        yield Region("grad_query", p.grad_query, 2 * rows * p.head_size, is_output=True)
        text = 4 * p.batch * p.text_slots * p.heads * p.head_size
        yield Region("grad_text", p.grad_text, text, is_output=True)


def _extent(p: Any, strides: Any, slots: int, parts: int) -> int:
    """Elements from the first to the last of a strided [B, slots, parts, H, D]."""
    last = (p.batch - 1) * strides.sample + (slots - 1) * strides.slot
    return int(last + (parts - 1) * strides.part + (p.heads - 1) * strides.head + p.head_size)
