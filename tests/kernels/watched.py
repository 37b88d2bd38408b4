"""A library for ops/interval.py whose kernels run in the emulator and may touch their tensors only.

Stands where the library loaded from nvcc's build would stand, so the callers under test are the
real ones. Outputs start as NaN.
"""

import ctypes
from typing import Any

from emulated import Counters, Emulator, Fault, Schedule

TILE = 64
NAN_BYTE = 0xFF


class WatchedLibrary:
    """Has the functions of libmegavideo; `schedule` and `counters` are those of the last call."""

    def __init__(self, emulator: Emulator, schedule: Schedule):
        self.emulator = emulator
        self.schedule = schedule
        self.counters = Counters()
        self.megavideo_error_text = emulator.library.megavideo_error_text
        self.megavideo_error_text.restype = ctypes.c_char_p

    def megavideo_interval_forward(self, problem: Any, stream: None) -> int:
        outputs = ("out", "lse")
        return self._call("megavideo_interval_forward", problem, outputs, ())

    def megavideo_interval_backward(self, problem: Any, stream: None) -> int:
        outputs = ("delta", "grad_image", "grad_text")
        inputs = ("out", "lse", "grad_out")
        return self._call("megavideo_interval_backward", problem, outputs, inputs)

    def _call(
        self, function: str, problem: Any, outputs: tuple[str, ...], inputs: tuple[str, ...]
    ) -> int:
        self.emulator.reset(self.schedule)
        layout = ("slots", "begin", "end", "bounds", "seen_by", "text_length")
        sizes = _bytes_of(problem._obj)
        for name in (*layout, "image_qkv", "text_kv", *inputs, *outputs):
            self._allow(name, getattr(problem._obj, name), sizes[name], name in outputs)
        status: int = getattr(self.emulator.library, function)(problem, None)
        self.emulator.library.emulator_counters(ctypes.byref(self.counters))
        if status == FAULT:
            raise Fault(self.emulator.library.emulator_fault().decode())
        return status

    def _allow(self, name: str, pointer: int | None, size: int, writable: bool) -> None:
        if pointer is None:
            return
        if writable:
            ctypes.memset(pointer, NAN_BYTE, size)
        self.emulator.library.emulator_region(
            name.encode(), ctypes.c_void_p(pointer), ctypes.c_size_t(size), int(writable)
        )


FAULT = 1000  # kFault of emulator/runtime.h


def _bytes_of(p: Any) -> dict[str, int]:
    """How far each pointer of a problem may be followed."""
    tiles = p.places // TILE
    rows = p.batch * p.image_slots * p.heads
    words = {"slots": p.places, "begin": p.places, "end": p.places, "lse": rows, "delta": rows}
    words |= {"bounds": 4 * tiles, "seen_by": 2 * tiles, "text_length": 2 * p.batch}
    halves = {name: rows * p.head_size for name in ("out", "grad_out")}
    halves["grad_image"] = 3 * rows * p.head_size
    halves["grad_text"] = 2 * p.batch * p.text_slots * p.heads * p.head_size
    halves["image_qkv"] = _extent(p, p.image, p.image_slots, 3)
    halves["text_kv"] = _extent(p, p.text, p.text_slots, 2)
    return {name: 4 * n for name, n in words.items()} | {name: 2 * n for name, n in halves.items()}


def _extent(p: Any, strides: Any, slots: int, parts: int) -> int:
    """Elements from the first to the last of a strided [B, slots, parts, H, D]."""
    last = (p.batch - 1) * strides.sample + (slots - 1) * strides.slot
    return int(last + (parts - 1) * strides.part + (p.heads - 1) * strides.head + p.head_size)
