"""What a checkpoint holds, in words and numbers; how two differ."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from megavideo.checkpoint.formats.interface import Reader, is_moment

PARTS = (
    ("embedding", r"embedding\."),
    ("spatial channel", r"layers\.\d+\.attention\.spatial\."),
    ("temporal channel", r"layers\.\d+\.attention\.(temporal\.|mixture)"),
    ("MLP", r"layers\.\d+\.mlp\."),
    ("LayerNorm", r"(layers\.\d+|head)\.\w*norm\."),
)


@dataclass(frozen=True)
class Difference:
    """A tensor in which two checkpoints differ.

    Attributes:
        size: largest absolute difference of values; None where they cannot be compared.
    """

    name: str
    what: str
    size: float | None = None


def describe(reader: Reader) -> list[str]:
    """Lines about a checkpoint: format, progress, parameters by part, sizes."""
    lines = [f"{reader.path}: {reader.format}, {len(reader.files)} files"]
    if reader.training is not None:
        progress = reader.training.progress
        lines += [
            f"  stage     {reader.training.stage}",
            f"  progress  step {progress.step}, {progress.updates} updates, "
            f"{progress.consumed_samples:,} samples",
            f"  base      {reader.training.base or 'none: everything is trained'}",
        ]
    lines += [_line(reader, part, pattern) for part, pattern in PARTS]
    lines.append(_line(reader, "all weights", ""))
    if any(map(is_moment, reader.tensors)):
        names = [name for name in reader.tensors if is_moment(name)]
        count = sum(reader.tensors[name].nbytes for name in names)
        lines.append(f"  {'optimizer':<17}{len(names):>6} tensors {count:>18,} bytes")
    return lines


def differences(a: Reader, b: Reader) -> Iterator[Difference]:
    """Everything in which two checkpoints differ, tensor by tensor; nothing if they are equal."""
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in b.tensors:
            yield Difference(name, "only in the first")
        elif name not in a.tensors:
            yield Difference(name, "only in the second")
        elif a.tensors[name].shape != b.tensors[name].shape:
            shapes = [list(reader.tensors[name].shape) for reader in (a, b)]
            yield Difference(name, f"shape {shapes[0]}, then {shapes[1]}")
        else:
            yield from _difference(a, b, name)


def _difference(a: Reader, b: Reader, name: str) -> Iterator[Difference]:
    first, second = a.read(name), b.read(name)
    types = f", {first.dtype} then {second.dtype}" if first.dtype != second.dtype else ""
    largest = (first.double() - second.double()).abs().max().item()
    bits_differ = not types and not torch.equal(
        first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8)
    )
    if types or bits_differ:
        yield Difference(name, f"max abs difference {largest:.3e}{types}", largest)


def _line(reader: Reader, part: str, pattern: str) -> str:
    specs = [
        spec
        for name, spec in reader.tensors.items()
        if re.match(pattern, name) and not is_moment(name)
    ]
    types = ", ".join(sorted({str(spec.dtype).removeprefix("torch.") for spec in specs}))
    parameters = sum(prod(spec.shape) for spec in specs)
    size = sum(spec.nbytes for spec in specs)
    return (
        f"  {part:<17}{len(specs):>6} tensors {parameters:>16,} parameters "
        f"{size:>18,} bytes  {types}"
    ).rstrip()
