"""Tensors in files as streams of rows: memory for a few megabytes, whatever a tensor's size.

    Stored    where a tensor lies in a file; `take` gives its rows one after another
    joined    a whole tensor's rows in order, out of the parts that tensor-parallel ranks hold
    scatter   the way back: every part gets its share of each block of rows
    Sink      a file whose tensors grow by `append`, several at a time

Files are read and written by position, not mapped: mapped pages would count as this process's
memory, and a file that shrinks would kill it.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch
from torch import Tensor

from megavideo.checkpoint.files import TensorSpec, opened, raw_bytes
from megavideo.parallel.shard import Shard, slice_plan

# Bytes of a block of rows: small enough to stay in a processor's cache from reading to writing.
BLOCK = 1 << 21

# The format's names of types (huggingface.co/docs/safetensors, "Format").
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Append = Callable[[Tensor], None]


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes, row by row, from `offset` on in the file `path`.

    Attributes:
        crc: CRC-32 of the bytes, where the file's format has one; None else.
    """

    path: Path
    offset: int
    spec: TensorSpec
    crc: int | None = None


class Rows:
    """The rows of a stored tensor, to be taken in order; checked when the last was taken."""

    def __init__(self, stored: Stored):
        self.stored = stored
        self._at = 0
        self._crc = 0
        self._buffer = torch.empty(0, dtype=stored.spec.dtype)

    def take(self, count: int) -> Tensor:
        """The next `count` rows, in memory that the next call uses again.

        Raises: ValueError if the file is too short, or its checksum differs.
        """
        spec = self.stored.spec
        shape = (count, *spec.shape[1:])
        if self._buffer.numel() < prod(shape):
            self._buffer = torch.empty(prod(shape), dtype=spec.dtype)
        block = self._buffer[: prod(shape)].view(shape)
        data = raw_bytes(block)
        read_at(self.stored.path, data, self.stored.offset + self._at * spec.row_bytes)
        self._at += count
        if self.stored.crc is not None:
            self._crc = zlib.crc32(data, self._crc)
            if self._at == spec.shape[0] and self._crc != self.stored.crc:
                raise ValueError(f"{self.stored.path} is damaged: a tensor's checksum differs")
        return block


def read_at(path: Path, data: memoryview, offset: int) -> None:
    """Fill `data` with a file's bytes from `offset` on.

    Raises: ValueError if the file ends before.
    """
    with open(path, "rb", buffering=0) as file:
        if not fill(file, data, offset):
            raise ValueError(f"{path} is damaged: it ends too early")


def fill(file: BinaryIO, data: memoryview, offset: int) -> bool:
    """Fill `data` with an unbuffered file's bytes from `offset` on; False if it ends before.

    One read may give less than was asked for, on network file systems above all.
    """
    while len(data):
        count = os.preadv(file.fileno(), [data], offset)
        if count == 0:
            return False
        data, offset = data[count:], offset + count
    return True


def joined(parts: Sequence[Stored], shard: Shard, whole: TensorSpec) -> Iterator[Tensor]:
    """Blocks of rows of the tensor that `parts`, by rank, make together.

    A block is good until the next one is asked for.

    Raises: ValueError if a file is damaged, or replicas of a tensor that is not cut differ.
    """
    ranks = [Rows(part) for part in parts]
    if shard.dim == 0:
        for piece in slice_plan(whole.shape[0], shard, 0, 1, held=len(parts)):
            for count in steps(piece.stop - piece.start, whole.row_bytes):
                yield ranks[piece.rank].take(count)
        return
    for count in steps(whole.shape[0], whole.row_bytes):
        blocks = [rows.take(count) for rows in ranks]
        if shard.dim is None:
            _check_replicas(parts, blocks)
        yield blocks[0] if shard.dim is None or len(blocks) == 1 else torch.cat(blocks, 1)


def scatter(
    blocks: Iterable[Tensor], shard: Shard, whole: TensorSpec, ranks: Sequence[Append]
) -> None:
    """Give every rank its part of each block; all of it to all where the tensor is not cut."""
    start = 0
    dim = shard.dim or 0
    plans = [
        slice_plan(whole.shape[dim], shard, rank, len(ranks)) if shard.dim is not None else []
        for rank in range(len(ranks))
    ]
    for block in blocks:
        for append, plan in zip(ranks, plans, strict=True):
            if shard.dim is None:
                append(block)
            for piece in plan:
                low, high = piece.start, piece.stop
                if dim == 0:
                    low, high = max(low - start, 0), min(high - start, len(block))
                if low < high:
                    append(block.narrow(dim, low, high - low))
        start += len(block)


def steps(rows: int, row_bytes: int) -> Iterator[int]:
    """Numbers of rows, each about BLOCK bytes, that add up to `rows`.

    Where it takes no more than twice that, they end at a multiple of a MiB, as the blocks do of
    which our files have digests: others would be read and checked twice.
    """
    whole = lcm(max(1, row_bytes), 1 << 20)
    step = whole if whole <= 2 * BLOCK else BLOCK
    step = max(1, step // max(1, row_bytes))
    for start in range(0, rows, step):
        yield min(step, rows - start)


def blocks_of(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in memory as blocks of rows."""
    start = 0
    for count in steps(tensor.shape[0], tensor[:1].nbytes):
        yield tensor[start : start + count]
        start += count


class Sink:
    """A file whose tensors grow row by row, each at its own place; threads may share it.

    It is neither fsynced nor renamed: that is its folder's matter.
    """

    def __init__(self, path: Path, places: Mapping[str, tuple[int, TensorSpec]]):
        self.path = path
        self._places = places
        self._filled = dict.fromkeys(places, 0)
        self._lock = Lock()  # the kernel has one a file too, on which threads would spin
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by `close`)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of the tensor `name`."""
        offset, spec = self._places[name]
        assert rows.dtype == spec.dtype and rows.shape[1:] == spec.shape[1:], (name, rows.shape)
        data = raw_bytes(rows)
        self._put(offset + self._filled[name], data)
        self._filled[name] += len(data)

    def close(self) -> None:
        """Finish the file, once all its tensors are there."""
        lacking = [n for n, (_, spec) in self._places.items() if self._filled[n] != spec.nbytes]
        assert not lacking, f"{self.path} lacks {lacking}"
        self._file.close()

    def abandon(self) -> None:
        """Let go of the file, whatever it holds."""
        self._file.close()

    def _put(self, offset: int, data: bytes | memoryview) -> None:
        with self._lock:
            while len(data):
                count = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[count:], offset + count


class SafetensorsSink(Sink):
    """A safetensors file of `tensors`."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorSpec]):
        header = header_bytes(tensors)
        places = {}
        offset = len(header)
        for name in file_order(tensors):
            places[name] = (offset, tensors[name])
            offset += tensors[name].nbytes
        super().__init__(path, places)
        self._put(0, header)


def file_order(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Names in the order in which a file holds them: wide types first, which aligns them all."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def header_bytes(tensors: Mapping[str, TensorSpec], **metadata: str) -> bytes:
    """What a safetensors file starts with: eight bytes of length, then JSON, filled with spaces up
    to a multiple of eight. The tensors follow in `file_order` without a gap."""
    # Readers of other libraries ask for this key before they take a file for PyTorch's.
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name in file_order(tensors):
        spec = tensors[name]
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def stored_tensors(path: Path) -> dict[str, Stored]:
    """What a safetensors file holds, and where, from its header alone.

    Raises: ValueError if it is damaged, or holds a type that no model of ours has.
    """
    with opened(path):  # the library checks that header and size agree
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return {name: _stored(path, name, entry, 8 + length) for name, entry in entries.items()}


def _stored(path: Path, name: str, entry: dict[str, object], start: int) -> Stored:
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    assert isinstance(shape, list) and isinstance(offsets, list)
    if kind not in DTYPES:
        raise ValueError(f"{path}: {name} has type {kind}; known: {', '.join(DTYPES)}")
    return Stored(path, start + offsets[0], TensorSpec(DTYPES[str(kind)], tuple(shape)))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two blocks of equal shape hold the same bits; NaN equals itself here."""
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _check_replicas(parts: Sequence[Stored], blocks: Sequence[Tensor]) -> None:
    for part, block in zip(parts, blocks, strict=True):
        if not same_bits(block, blocks[0]):
            raise ValueError(
                f"ranks hold different values of a replicated tensor: {parts[0].path}, {part.path}"
            )
