"""PyTorch's .pt files written one tensor at a time: `torch.save` would hold all of them at once.

A .pt file is a zip archive of uncompressed records: `data.pkl` pickles the object with a reference
in place of each storage, `data/<key>` has a storage's bytes. So the object is pickled first, from
stand-ins that know shapes and types only, and the bytes follow. Written here, read by `torch.load`.
"""

import io
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any
from zipfile import ZIP64_LIMIT, ZipFile, ZipInfo

import torch
from torch import Tensor

from megavideo.checkpoint.files import raw_bytes
from megavideo.checkpoint.tensor_stream import TensorSpec

# What the format calls a storage of each type.
STORAGES = {
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.float32: torch.FloatStorage,
}
ALIGNMENT = 64  # torch's own: a mapped tensor then starts at a cache line


@contextmanager
def pt_writer(
    path: Path, tensors: Mapping[str, TensorSpec], rest: Mapping[str, object]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield `write(name, tensor)`, to be called for `tensors` in order, each once.

    The file loads as `{**rest, "module": tensors}`. It is fsynced at the end.
    """
    waiting = iter(tensors.items())
    keys = {name: str(number) for number, name in enumerate(tensors)}
    with open(path, "wb") as file:
        with ZipFile(file, "w") as archive:
            root = path.stem
            archive.writestr(ZipInfo(f"{root}/data.pkl"), _pickled(tensors, keys, rest))
            archive.writestr(ZipInfo(f"{root}/byteorder"), sys.byteorder)

            def write(name: str, tensor: Tensor) -> None:
                found = (name, TensorSpec(tensor.dtype, tuple(tensor.shape)))
                assert found == next(waiting), f"{found} is out of order or not as announced"
                record = _aligned(f"{root}/data/{keys[name]}", file.tell(), found[1].nbytes)
                with archive.open(record, "w") as stream:
                    stream.write(raw_bytes(tensor))

            yield write
            assert next(waiting, None) is None, f"{path} lacks tensors"
            archive.writestr(ZipInfo(f"{root}/version"), "3\n")
        file.flush()
        os.fsync(file.fileno())


class _Storage:
    """Stands for a storage that lies in the archive under `key`."""

    def __init__(self, spec: TensorSpec, key: str):
        self.reference = ("storage", STORAGES[spec.dtype], key, "cpu", prod(spec.shape))


class _StandIn:
    """Stands for a tensor whose bytes are written later."""

    def __init__(self, spec: TensorSpec, key: str):
        self.spec = spec
        self.storage = _Storage(spec, key)


class _Pickler(pickle.Pickler):
    """Pickles stand-ins as torch.save pickles tensors and their storages."""

    def persistent_id(self, item: Any) -> Any:
        return item.reference if isinstance(item, _Storage) else None

    def reducer_override(self, item: Any) -> Any:
        if not isinstance(item, _StandIn):
            return NotImplemented
        shape = item.spec.shape
        stride = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        arguments: tuple[Any, ...] = (item.storage, 0, shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def _pickled(
    tensors: Mapping[str, TensorSpec], keys: Mapping[str, str], rest: Mapping[str, object]
) -> bytes:
    module = {name: _StandIn(spec, keys[name]) for name, spec in tensors.items()}
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=2).dump({**rest, "module": module})
    return buffer.getvalue()


def _aligned(name: str, position: int, nbytes: int) -> ZipInfo:
    """A record whose bytes start at a multiple of ALIGNMENT, filled up as torch does ('FB')."""
    record = ZipInfo(name)
    record.file_size = nbytes  # past 2 GiB this makes the record's header a long one
    long_header = 20 if nbytes * 1.05 > ZIP64_LIMIT else 0
    start = position + 30 + len(name) + long_header + 4
    padding = -start % ALIGNMENT
    record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    return record
