"""A safetensors file that carries the digests of its content, so that any slice can be checked.

Its header's metadata has, for each tensor, the XXH3-128 of every block of 1 MiB. The `seal` of a
file is the digest of that header: who knows it can read some rows, check the blocks that they lie
in, and need not read the rest. Any reader of safetensors reads the file.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from megavideo.checkpoint.files import raw_bytes
from megavideo.checkpoint.tensor_stream import (
    DTYPES,
    Sink,
    TensorSpec,
    file_order,
    fill,
    header_bytes,
)
from megavideo.files import fsync_file

BLOCK = 1 << 20
DIGEST = 32  # hexadecimal digits
BAND = 16 * BLOCK  # what reading columns holds at a time
DIGESTS = "xxh3-128 of "


class PartSink(Sink):
    """A part file whose tensors grow row by row, each at its own place; threads may share it."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec]):
        empty = {name: "0" * DIGEST * _count(spec) for name, spec in tensors.items()}
        length = len(_header(tensors, empty))  # the digests come last
        offsets = _offsets(tensors, length)
        super().__init__(path, {name: (offsets[name], tensors[name]) for name in tensors})
        self._tensors = tensors
        self._digests = {name: _BlockDigests() for name in tensors}

    def append(self, name: str, rows: Tensor) -> None:
        super().append(name, rows)
        self._digests[name].update(raw_bytes(rows))

    def close(self) -> None:
        digests = {name: running.finished() for name, running in self._digests.items()}
        self._put(0, _header(self._tensors, digests))
        super().close()


@contextmanager
def part_writer(
    path: Path, tensors: Mapping[str, TensorSpec]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield `write(name, tensor)`, to be called once for each of `tensors`.

    The file is fsynced at the end, but not renamed into place: its folder is the caller's matter.
    """
    sink = PartSink(path, tensors)
    try:
        yield lambda name, tensor: sink.append(name, tensor if tensor.dim() else tensor.reshape(1))
        sink.close()
    finally:
        sink.abandon()
    fsync_file(path)


def write_part_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a whole file, fsynced; returns its seal."""
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with part_writer(path, specs) as write:
        for name in file_order(specs):
            write(name, tensors[name])
    return seal_of(path)


def read_part_file(path: Path, seal: str) -> dict[str, Tensor]:
    """All tensors of the file whose seal this is.

    Raises: ValueError if the file is damaged or another; FileNotFoundError.
    """
    file = PartFile(path, seal)
    return {name: file.read(name) for name in file.tensors}


def seal_of(path: Path) -> str:
    """The seal of the file at `path`, whose content is taken as it is."""
    with open(path, "rb", buffering=0) as file:
        return _digest(memoryview(_read_header(file, path)))


class PartFile:
    """Reads rows or columns of a sealed file's tensors, and checks every block that it reads.

    Args:
        seal: what the header must have for a digest.
        tensors: what the file must hold; None takes what it says.

    Raises:
        ValueError: if the file is damaged or another; FileNotFoundError.
    """

    def __init__(self, path: Path, seal: str, tensors: Mapping[str, TensorSpec] | None = None):
        self.path = path
        with open(path, "rb", buffering=0) as file:
            header = _read_header(file, path)
            size = os.fstat(file.fileno()).st_size
        if _digest(memoryview(header)) != seal:
            raise ValueError(
                f"{path} is damaged, or another file: its header differs from its seal"
            )
        entries = json.loads(header[8:])
        metadata = entries.pop("__metadata__")
        self.tensors = _specs(entries) if tensors is None else dict(tensors)
        self._digests = {name: metadata.get(DIGESTS + name, "") for name in self.tensors}
        if header != _header(self.tensors, self._digests):
            raise ValueError(f"{path} holds other tensors than its manifest says")
        self._offsets = _offsets(self.tensors, len(header))
        expected = len(header) + sum(spec.nbytes for spec in self.tensors.values())
        if size != expected:
            raise ValueError(f"{path} is damaged: it has {size} bytes instead of {expected}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of `name`; a scalar has one row."""
        spec = self.tensors[name]
        shape = spec.shape or (1,)
        stop = shape[0] if stop is None else stop
        rows = torch.empty((stop - start, *shape[1:]), dtype=spec.dtype)
        if rows.numel():
            with open(self.path, "rb", buffering=0) as file:
                self._fill(file, name, start * (rows.nbytes // len(rows)), raw_bytes(rows))
        return rows if spec.shape else rows.reshape(())

    def read_columns(self, name: str, first: int, last: int, start: int, stop: int) -> Tensor:
        """Columns [first, last) of rows [start, stop) of a matrix, read in bands of whole rows."""
        spec = self.tensors[name]
        if (first, last) == (0, spec.shape[1]):
            return self.read(name, start, stop)
        columns = torch.empty((stop - start, last - first), dtype=spec.dtype)
        step = max(1, BAND // (spec.shape[1] * spec.dtype.itemsize or 1))
        for low in range(start, stop, step):
            high = min(low + step, stop)
            columns[low - start : high - start] = self.read(name, low, high)[:, first:last]
        return columns

    def verify(self) -> None:
        """Read and check everything, in memory for one band.

        Raises: ValueError if anything is damaged.
        """
        band = memoryview(bytearray(BAND))
        with open(self.path, "rb", buffering=0) as file:
            for name, spec in self.tensors.items():
                for first in range(0, spec.nbytes, BAND):
                    self._fill(file, name, first, band[: min(BAND, spec.nbytes - first)])

    def _fill(self, file: BinaryIO, name: str, first: int, target: memoryview) -> None:
        """Put the bytes of `name` from `first` on into `target`."""
        last, size = first + len(target), self.tensors[name].nbytes
        for number in range(first // BLOCK, -(-last // BLOCK)):
            low, high = number * BLOCK, min((number + 1) * BLOCK, size)
            inside = first <= low and high <= last
            block = target[low - first : high - first] if inside else memoryview(bytearray(BLOCK))
            block = block[: high - low]
            self._read_block(file, name, number, block)
            if not inside:
                a, b = max(first, low), min(last, high)
                target[a - first : b - first] = block[a - low : b - low]

    def _read_block(self, file: BinaryIO, name: str, number: int, block: memoryview) -> None:
        if not fill(file, block, self._offsets[name] + number * BLOCK):
            raise ValueError(f"{self.path} is damaged: it ends within {name}")
        if _digest(block) != self._digests[name][number * DIGEST : (number + 1) * DIGEST]:
            raise ValueError(f"{self.path} is damaged: {name} differs from its digest")


class _BlockDigests:
    """Digests of BLOCK bytes each, of content that comes in pieces of any length."""

    def __init__(self) -> None:
        self._done: list[str] = []
        self._begun = xxhash.xxh3_128()
        self._room = BLOCK

    def update(self, content: memoryview) -> None:
        while len(content):
            piece = content[: self._room]
            self._begun.update(piece)
            self._room -= len(piece)
            content = content[len(piece) :]
            if self._room == 0:
                self._next()

    def finished(self) -> str:
        if self._room < BLOCK:
            self._next()
        return "".join(self._done)

    def _next(self) -> None:
        self._done.append(self._begun.hexdigest())
        self._begun.reset()
        self._room = BLOCK


def _header(tensors: Mapping[str, TensorSpec], digests: Mapping[str, str]) -> bytes:
    return header_bytes(tensors, **{DIGESTS + name: digests[name] for name in file_order(tensors)})


def _specs(entries: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(DTYPES[e["dtype"]], tuple(e["shape"])) for n, e in entries.items()}


def _read_header(file: BinaryIO, path: Path) -> bytes:
    size = os.fstat(file.fileno()).st_size
    header = bytearray(8)
    if fill(file, memoryview(header), 0):
        count = int.from_bytes(header, "little")
        header = bytearray(8 + count if count <= size - 8 else 0)
        if header and fill(file, memoryview(header), 0):
            return bytes(header)
    raise ValueError(f"{path} is damaged: it is no safetensors file")


def _offsets(tensors: Mapping[str, TensorSpec], start: int) -> dict[str, int]:
    offsets = {}
    for name in file_order(tensors):
        offsets[name] = start
        start += tensors[name].nbytes
    return offsets


def _count(spec: TensorSpec) -> int:
    return -(-spec.nbytes // BLOCK)


def _digest(block: memoryview) -> str:
    return xxhash.xxh3_128_hexdigest(block)
