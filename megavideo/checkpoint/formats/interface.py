"""What every checkpoint format offers to `megavideo convert`: a reader, a writer, or both.

Tensors go by canonical parameter names; optimizer moments by `NAME.exp_avg`, `NAME.exp_avg_sq`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.manifest import Training
from megavideo.checkpoint.tensor_stream import Sink, TensorSpec, scatter, steps
from megavideo.model.table import expected_shapes, layer_of, shard_named
from megavideo.parallel.shard import Shard, cut

MOMENTS = (".exp_avg", ".exp_avg_sq")


class Source(ABC):
    """Named tensors that are read one at a time, whole or in part.

    A subclass gives `blocks`, or `read` and `read_part`; each has the others by default.

    Attributes:
        path: where they lie.
        tensors: names, and types and shapes of whole tensors.
    """

    path: Path
    tensors: dict[str, TensorSpec]

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The whole tensor as blocks of rows in order, on the CPU; from any thread.

        A block is good until the next one is asked for.

        Raises: ValueError if it is damaged, with the last block at the latest.
        """
        start = 0
        spec = self.tensors[name]
        for count in steps(spec.shape[0], spec.row_bytes):
            yield self.read_part(name, 0, 1, start, start + count)
            start += count

    def read(self, name: str) -> Tensor:
        """The whole tensor, on the CPU. Safe to call from several threads.

        Raises: ValueError if it is damaged.
        """
        return assembled(self.tensors[name], self.blocks(name))

    def read_part(
        self, name: str, rank: int, size: int, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Rows [start, stop) of what `rank` of `size` tensor-parallel ranks holds of `name`.

        Formats that can read so little do; others read the tensor and cut it.

        Raises: ValueError if it is damaged, or cannot be cut so.
        """
        return cut(self.read(name), shard_for(name), rank, size)[start:stop]


class Selection(Source):
    """Some of the tensors of another source."""

    def __init__(self, source: Source, names: Iterable[str]):
        self.path = source.path
        self.tensors = {name: source.tensors[name] for name in names}
        self._source = source

    def read(self, name: str) -> Tensor:
        return self._source.read(name)

    def read_part(
        self, name: str, rank: int, size: int, start: int = 0, stop: int | None = None
    ) -> Tensor:
        return self._source.read_part(name, rank, size, start, stop)


class Reader(Source):
    """A checkpoint of one format.

    Attributes:
        format: its name for people.
        files: every file that it is made of, relative to `path`.
        training: progress, configuration and so on of a training run; None for bare weights.
        heads: attention heads, where the checkpoint says it.
    """

    format: str
    files: list[Path]
    training: Training | None = None

    @property
    def heads(self) -> int | None:
        return None if self.training is None else self.training.config["model"]["heads"]

    def resident(self, name: str) -> int:
        """Bytes of `name` that `blocks` holds at a time beyond the blocks themselves."""
        return 0

    def verify_files(self) -> None:
        """Check what reading every tensor does not.

        Raises: ValueError if a file is damaged.
        """


@dataclass(frozen=True)
class Group:
    """Files that are written together, and the tensors of which they hold parts."""

    files: tuple[str, ...]
    tensors: tuple[str, ...]


class OpenGroup:
    """The files of a group while they are written: each is a rank's, and gets the rank's parts.

    A tensor that is not cut goes into every file that has a place for it.
    """

    def __init__(self, sinks: Sequence[Sink]):
        self.sinks = sinks

    def write(self, name: str, spec: TensorSpec, blocks: Iterable[Tensor]) -> None:
        """Take a whole tensor as blocks of rows. Threads may write different tensors."""
        holders = [sink for sink in self.sinks if name in sink]
        appends = [partial(sink.append, name) for sink in holders]
        scatter(blocks, shard_for(name), spec, appends)

    def close(self) -> None:
        """Finish the files; all tensors are there."""
        for sink in self.sinks:
            sink.close()

    def abandon(self) -> None:
        """Let go of the files, whatever they hold."""
        for sink in self.sinks:
            sink.abandon()


class Writer(ABC):
    """A checkpoint of one format, written group by group into a folder that is not yet public."""

    format: str

    @abstractmethod
    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        """How `tensors` are laid out over files.

        Raises: ValueError if the format cannot hold them.
        """

    @abstractmethod
    def open(self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]) -> OpenGroup:
        """Begin the files of `group`; their folders exist."""

    def resident(self, name: str, spec: TensorSpec) -> int:
        """Bytes of `name` that writing it holds at a time beyond a block of rows."""
        return 0

    @abstractmethod
    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        """Write what makes the files a checkpoint: manifest, index or pointer."""


def is_moment(name: str) -> bool:
    """Whether `name` is a tensor of the optimizer's state."""
    return name.endswith(MOMENTS)


def parameter_of(name: str) -> str:
    """The parameter that a weight or a moment belongs to."""
    for suffix in MOMENTS:
        name = name.removesuffix(suffix)
    return name


def shard_for(name: str) -> Shard:
    """How the weight or moment `name` is cut: a moment like its parameter."""
    return shard_named(parameter_of(name))


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Names grouped by layer, in the model's order."""
    layers: dict[str, list[str]] = {}
    for name in sorted(names, key=_position):
        layers.setdefault(layer_of(name), []).append(name)
    return layers


def assembled(spec: TensorSpec, blocks: Iterable[Tensor]) -> Tensor:
    """The whole tensor in memory."""
    whole = torch.empty(spec.shape, dtype=spec.dtype)
    start = 0
    for block in blocks:
        whole[start : start + len(block)] = block
        start += len(block)
    return whole


def check_whole(reader: Reader) -> None:
    """Check that a checkpoint holds exactly the weights of one model, of fitting shapes.

    Raises: ValueError listing what is missing, unexpected or of another shape.
    """
    have = {n: spec.shape for n, spec in reader.tensors.items() if not is_moment(n)}
    try:
        want = expected_shapes(have)
    except ValueError as error:
        raise ValueError(f"{reader.path} is no whole checkpoint: {error}") from None
    problems = [f"missing {name}" for name in sorted(want.keys() - have.keys())]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        if have[name] != want[name]:
            problems.append(f"{name} has shape {list(have[name])}, not {list(want[name])}")
    for name in sorted(filter(is_moment, reader.tensors)):
        if reader.tensors[name].shape != have.get(parameter_of(name)):
            problems.append(f"{name} belongs to no weight of its shape")
    if problems:
        raise ValueError(f"{reader.path} is no whole checkpoint: {'; '.join(problems)}")


def _position(name: str) -> tuple[int, int, str]:
    first, *rest = name.split(".")
    kind = {"embedding": 0, "layers": 1}.get(first, 2)
    return kind, int(rest[0]) if kind == 1 else 0, name
