"""Tensor files (safetensors) whose every tensor has a digest that is checked when it is read."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class TensorEntry:
    """What a file's tensor must turn out to be."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


def tensor_entry(tensor: Tensor) -> TensorEntry:
    """Describe `tensor` (any device); the digest is XXH3-128 of its bytes in row-major order."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorEntry(dtype, tuple(tensor.shape), xxhash.xxh3_128_hexdigest(raw_bytes(tensor)))


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


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Write `tensors` to `path`, make it durable, and return what must be read back."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(held, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return {name: tensor_entry(tensor) for name, tensor in held.items()}


def read_tensors(path: Path, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
    """Read the tensors that `entries` promises, checking each.

    Raises:
        ValueError: naming the file and the tensor that is missing, unexpected or damaged.
    """
    return dict(_checked(path, entries))


def verify_tensors(path: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Read and check the file one tensor at a time, in memory for the largest.

    Raises:
        ValueError: as `read_tensors`.
    """
    for _ in _checked(path, entries):
        pass


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


def _checked(path: Path, entries: Mapping[str, TensorEntry]) -> Iterator[tuple[str, Tensor]]:
    with opened(path) as file:
        if set(file.keys()) != set(entries):
            odd = sorted(set(file.keys()) ^ set(entries))
            raise ValueError(f"{path} is damaged: missing or unexpected tensors {odd}")
        for name in entries:
            tensor = file.get_tensor(name)
            if tensor_entry(tensor) != entries[name]:
                raise ValueError(f"{path} is damaged: {name} differs from its digest")
            yield name, tensor
