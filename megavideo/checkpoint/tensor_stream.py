"""Safetensors files written one tensor at a time: memory for one tensor, not for the file."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megavideo.checkpoint.files import TensorSpec, opened, raw_bytes

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


def file_order(tensors: Mapping[str, TensorSpec]) -> list[str]:
    """Names in the order in which a file holds them: wide types first, which aligns them all."""
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


@contextmanager
def safetensors_writer(
    path: Path, tensors: Mapping[str, TensorSpec]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Yield `write(name, tensor)`, to be called once for each of `tensors`, in `file_order`.

    The file is fsynced at the end, but not renamed into place: its folder is the caller's matter.
    """
    order = file_order(tensors)
    waiting = iter(order)
    with open(path, "wb") as file:
        file.write(header_bytes(tensors))

        def write(name: str, tensor: Tensor) -> None:
            assert name == next(waiting), f"{name} is out of order"
            found = TensorSpec(tensor.dtype, tuple(tensor.shape))
            assert found == tensors[name], f"{name}: {found}, announced {tensors[name]}"
            file.write(raw_bytes(tensor))

        yield write
        assert next(waiting, None) is None, f"{path} lacks tensors"
        file.flush()
        os.fsync(file.fileno())


def read_specs(path: Path) -> dict[str, TensorSpec]:
    """What a safetensors file holds, from its header alone.

    Raises: ValueError if it is damaged, or holds a type that no model of ours has.
    """
    with opened(path) as file:
        return {name: _spec(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118


def _spec(path: Path, name: str, part) -> TensorSpec:  # type: ignore[no-untyped-def]
    if part.get_dtype() not in DTYPES:
        raise ValueError(f"{path}: {name} has type {part.get_dtype()}; known: {', '.join(DTYPES)}")
    return TensorSpec(DTYPES[part.get_dtype()], tuple(part.get_shape()))


def header_bytes(tensors: Mapping[str, TensorSpec], **metadata: str) -> bytes:
    """What a file starts with: eight bytes of length, then JSON, filled with spaces up to a
    multiple of eight. The tensors follow in `file_order` without a gap."""
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
