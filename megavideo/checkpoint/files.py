"""Digests of tensors, and safetensors files opened for reading."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.dtype.itemsize * prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: of all that has the same first index."""
        return self.dtype.itemsize * prod(self.shape[1:])


@dataclass(frozen=True)
class TensorEntry:
    """What a file's tensor must turn out to be."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @property
    def spec(self) -> TensorSpec:
        """The tensor without its values."""
        return TensorSpec(getattr(torch, self.dtype), self.shape)


def tensor_entry(tensor: Tensor) -> TensorEntry:
    """Describe `tensor` (any device); the digest is XXH3-128 of its bytes in row-major order."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(dtype, tuple(tensor.shape), xxhash.xxh3_128_hexdigest(raw_bytes(tensor)))


class RunningEntry:
    """Describes a tensor whose rows come one block after another."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()
        self._rows = 0

    def over(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pass the blocks on, all of which make the tensor."""
        for block in blocks:
            self._digest.update(raw_bytes(block))
            self._rows += len(block)
            self._last = block
            yield block

    def entry(self) -> TensorEntry:
        """What `tensor_entry` would say of the whole tensor."""
        dtype = str(self._last.dtype).removeprefix("torch.")
        shape = (self._rows, *self._last.shape[1:])
        return TensorEntry(dtype, shape, self._digest.hexdigest())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` (any device) in row-major order; not copied where they lie so."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def combined_digest(entries: Mapping[str, TensorEntry]) -> str:
    """One digest for a set of named tensors: names, types, shapes and contents all count."""
    lines = (
        f"{name} {entry.dtype} {list(entry.shape)} {entry.digest}"
        for name, entry in sorted(entries.items())
    )
    return xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The safetensors file at `path`, for `keys`, `get_tensor` and `get_slice`.

    Raises:
        ValueError: if it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
