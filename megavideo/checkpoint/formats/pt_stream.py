"""PyTorch's .pt files written and read as streams of rows: memory for blocks, not for the file.

A .pt file is a zip archive of uncompressed records: `data.pkl` pickles the object with a reference
in place of each storage, `data/<key>` has a storage's bytes. So the object is pickled first, from
stand-ins that know shapes and types only, and the bytes follow. What is read is unpickled and
mapped by `torch.load(weights_only=True, mmap=True)`; values are read from their place in the file.
"""

import io
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavideo.checkpoint.files import raw_bytes
from megavideo.checkpoint.formats.interface import shard_for
from megavideo.checkpoint.tensor_stream import BLOCK, Sink, Stored, TensorSpec, read_at
from megavideo.parallel.shard import whole_shape

# What the format calls a storage of each type.
STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
}
ALIGNMENT = 64  # torch's own: a mapped tensor then starts at a cache line

# Zip's structures (PKWARE's APPNOTE, 4.3 and 4.5). Sizes and offsets are always in the ZIP64 extra
# fields, whose marks stand in the places of the short ones.
LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END_64 = struct.Struct("<4sQ2H2I4Q4sIQI")
END = struct.Struct("<4s4H2IH")
LONG = 0xFFFFFFFF
VERSION = 45  # the first that knows ZIP64
DATE = (1 << 5) | 1  # 1980-01-01: equal content gives equal files


@dataclass(frozen=True)
class StandIn:
    """Stands, in an object to be written, for a tensor whose rows follow under `name`."""

    name: str
    spec: TensorSpec


@dataclass
class _Record:
    """A record of the archive: its name in it, where its header starts, its bytes."""

    name: str
    start: int
    size: int
    crc: int = 0

    @property
    def padding(self) -> int:
        """Bytes that fill the header up, so that the data start at a multiple of ALIGNMENT."""
        return -(self.start + LOCAL.size + len(self.name) + 20 + 4) % ALIGNMENT

    @property
    def data(self) -> int:
        """Where the bytes start."""
        return self.start + LOCAL.size + len(self.name) + 20 + 4 + self.padding

    @property
    def end(self) -> int:
        """Where the next record starts."""
        return self.data + self.size


class PtSink(Sink):
    """A .pt file that loads as `content`, in which a `StandIn` becomes the tensor appended."""

    def __init__(self, path: Path, content: object):
        stand_ins, pickled = _pickled(content)
        small = {"data.pkl": pickled, "byteorder": sys.byteorder.encode(), "version": b"3\n"}
        keys = {stand_in.name: f"data/{key}" for key, stand_in in enumerate(stand_ins)}
        sizes = {name: len(data) for name, data in small.items()}
        sizes |= {keys[item.name]: item.spec.nbytes for item in stand_ins}
        self._records = _laid_out(path.stem, sizes)
        self._keys = keys
        places = {i.name: (self._records[keys[i.name]].data, i.spec) for i in stand_ins}
        super().__init__(path, places)
        for name, data in small.items():
            self._records[name].crc = zlib.crc32(data)
            self._put(self._records[name].data, data)

    def append(self, name: str, rows: Tensor) -> None:
        super().append(name, rows)
        record = self._records[self._keys[name]]
        record.crc = zlib.crc32(raw_bytes(rows), record.crc)

    def close(self) -> None:
        for record in self._records.values():
            self._put(record.start, _local_header(record))
        self._put(max(r.end for r in self._records.values()), _directory(self._records.values()))
        super().close()


class PtFile:
    """A .pt file: its object, and where in the file the values of the object's tensors lie.

    Attributes:
        content: the object; its tensors are memory-mapped, and nothing of them is read yet.
    """

    def __init__(self, path: Path, safe_types: Sequence[Any] = ()):
        """Raises: ValueError if it is damaged, or holds more than tensors and `safe_types`."""
        self.path = path
        self.content = _load_mapped(path, safe_types)
        self._records = _read_records(path)
        self._base = _mapped_at(path, _tensors(self.content), self._records)
        self._streamed: set[int] = set()

    def stored(self, tensor: Tensor) -> Stored:
        """Where the values of a tensor in `content` lie.

        Raises: ValueError if they do not lie there row by row.
        """
        spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
        if not tensor.is_contiguous():
            raise ValueError(f"{self.path} holds a tensor {list(spec.shape)} not row by row")
        start = tensor.data_ptr() - self._base
        record = self._records.get(start)
        if record is None or record.size != spec.nbytes:  # one of several in its storage
            return Stored(self.path, start, spec)
        self._streamed.add(start)
        return Stored(self.path, start, spec, record.crc)

    def verify_rest(self) -> None:
        """Check the checksums that reading the `stored` tensors does not check.

        Raises: ValueError if one differs.
        """
        for start, record in self._records.items():
            if start not in self._streamed and _crc(self.path, start, record.size) != record.crc:
                raise ValueError(
                    f"{self.path} is damaged: the checksum of its record {record.name} differs"
                )


def check_same_names(files: Sequence[Path], ranks: Sequence[Mapping[str, Tensor]]) -> None:
    """Raises: ValueError if ranks hold parts of different tensors."""
    for file, tensors in zip(files, ranks, strict=True):
        odd = sorted(tensors.keys() ^ ranks[0].keys())
        if odd:
            raise ValueError(f"{file} and {files[0].name} differ in having {', '.join(odd)}")


def whole_spec(folder: Path, name: str, parts: Sequence[Stored]) -> TensorSpec:
    """What the ranks' parts of the weight or moment `name` make together.

    Raises: ValueError if they do not fit each other.
    """
    if len({part.spec.dtype for part in parts}) > 1:
        raise ValueError(f"{folder}: {name} has another type in every rank")
    try:
        shape = whole_shape([part.spec.shape for part in parts], shard_for(name))
    except ValueError as error:
        raise ValueError(f"{folder}: {name}: {error}") from None
    return TensorSpec(parts[0].spec.dtype, shape)


def named_errors(blocks: Iterable[Tensor], what: str) -> Iterator[Tensor]:
    """Pass blocks on; an error that reading them raises gets the name of the tensor."""
    try:
        yield from blocks
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


class _Storage:
    """Stands for a storage that lies in the archive under `key`."""

    def __init__(self, spec: TensorSpec, key: str):
        self.reference = ("storage", STORAGES[spec.dtype], key, "cpu", prod(spec.shape))


class _Pickler(pickle.Pickler):
    """Pickles stand-ins as torch.save pickles tensors and their storages."""

    def __init__(self, buffer: io.BytesIO):
        super().__init__(buffer, protocol=2)
        self.stand_ins: list[StandIn] = []

    def persistent_id(self, item: Any) -> Any:
        return item.reference if isinstance(item, _Storage) else None

    def reducer_override(self, item: Any) -> Any:
        if not isinstance(item, StandIn):
            return NotImplemented
        storage = _Storage(item.spec, str(len(self.stand_ins)))
        self.stand_ins.append(item)
        shape = item.spec.shape
        stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        arguments: tuple[Any, ...] = (storage, 0, shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def _pickled(content: object) -> tuple[list[StandIn], bytes]:
    """Stand-ins in the order of their storages' keys, and the pickled object."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(content)
    return pickler.stand_ins, buffer.getvalue()


def _laid_out(root: str, sizes: Mapping[str, int]) -> dict[str, _Record]:
    """Records of `sizes` one behind another, by their names below `root`."""
    records: dict[str, _Record] = {}
    start = 0
    for name, size in sizes.items():
        records[name] = _Record(f"{root}/{name}", start, size)
        start = records[name].end
    return records


def _local_header(record: _Record) -> bytes:
    fields = (b"PK\3\4", VERSION, 0, 0, 0, DATE, record.crc, LONG, LONG, len(record.name))
    extra = struct.pack("<2H2Q", 1, 16, record.size, record.size)
    extra += b"FB" + struct.pack("<H", record.padding) + b"Z" * record.padding
    return LOCAL.pack(*fields, len(extra)) + record.name.encode() + extra


def _directory(records: Any) -> bytes:
    """The central directory, and the two records that end an archive."""
    entries = b"".join(map(_central_header, records))
    start, count = max(record.end for record in records), len(records)
    end = start + len(entries)
    end_64 = END_64.pack(
        *(b"PK\6\6", 44, VERSION, VERSION, 0, 0, count, count, len(entries), start),
        *(b"PK\6\7", 0, end, 1),
    )
    return entries + end_64 + END.pack(b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, LONG, LONG, 0)


def _central_header(record: _Record) -> bytes:
    extra = struct.pack("<2H3Q", 1, 24, record.size, record.size, record.start)
    fields = (b"PK\1\2", VERSION, VERSION, 0, 0, 0, DATE, record.crc, LONG, LONG)
    lengths = (len(record.name), len(extra), 0, 0, 0, 0, LONG)
    return CENTRAL.pack(*fields, *lengths) + record.name.encode() + extra


def _load_mapped(path: Path, safe_types: Sequence[Any]) -> Any:
    try:
        with torch.serialization.safe_globals(list(safe_types)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and random states: {reason}"
        ) from None


def _tensors(content: object) -> Iterator[Tensor]:
    """Every tensor in an object that was loaded."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for item in content.values():
            yield from _tensors(item)
    elif isinstance(content, list | tuple):
        for item in content:
            yield from _tensors(item)


def _mapped_at(path: Path, tensors: Iterable[Tensor], records: Mapping[int, _Record]) -> int:
    """The address of a mapped file's first byte, of which torch tells only those of storages.

    It is the one at a page's start from which every storage lies where a record of its size does.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    storages.pop(0, None)  # those of empty tensors
    if not storages:
        return 0
    fitting = [
        base
        for base in (min(storages) - start for start in records)
        if base % mmap.PAGESIZE == 0
        and all(at - base in records and records[at - base].size == n for at, n in storages.items())
    ]
    if len(fitting) != 1:
        raise ValueError(f"{path} is damaged: its records are not those that its object refers to")
    return fitting[0]


def _read_records(path: Path) -> dict[int, _Record]:
    """Records by where their bytes start; `start` of the records is not what it is in writing."""
    records = {}
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            for info in archive.infolist():
                file.seek(info.header_offset)
                *_, name, extra = LOCAL.unpack(file.read(LOCAL.size))
                data = info.header_offset + LOCAL.size + name + extra
                records[data] = _Record(info.filename, info.header_offset, info.file_size, info.CRC)
    except (zipfile.BadZipFile, struct.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return records


def _crc(path: Path, start: int, size: int) -> int:
    crc = 0
    buffer = memoryview(bytearray(min(size, BLOCK)))
    for offset in range(0, size, BLOCK):
        data = buffer[: min(BLOCK, size - offset)]
        read_at(path, data, start + offset)
        crc = zlib.crc32(data, crc)
    return crc
