"""Folders of parts: a file per layer and tensor-parallel rank. Checkpoints, bases and converted
weights are such folders; this says how files are named, what each holds, and how to read slices.

FOLDER/embedding.tp-00-of-02.safetensors, layers.0.tp-00-of-02.safetensors, ...
FOLDER/optimizer.layers.0.tp-00-of-02.safetensors, ...   of a training run: the moments
FOLDER/manifest.json or weights.json                     the manifest, written last

Rank r's parts lie in the files of rank r; a tensor that is not cut lies in those of rank 0, once.
Pipeline and data-parallel ranks leave no trace: who writes a file does not matter to who reads it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from megavideo.checkpoint.formats.interface import Source, by_layer, is_moment, shard_for
from megavideo.checkpoint.manifest import Manifest, read_manifest
from megavideo.checkpoint.part_file import PartFile
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.model.table import layer_of
from megavideo.parallel.shard import Piece, part_shape, slice_plan


def file_of(name: str, rank: int, tp: int) -> str:
    """The file in which `rank` keeps its part of the weight or moment `name`."""
    kind = "optimizer." if is_moment(name) else ""
    return f"{kind}{layer_of(name)}.tp-{rank:02d}-of-{tp:02d}.safetensors"


def sets_of(tensors: Mapping[str, TensorSpec]) -> list[dict[str, TensorSpec]]:
    """Whole tensors by what goes into one file a rank: a layer's weights, or its moments."""
    return [
        {name: tensors[name] for name in names}
        for moments in (False, True)
        for names in by_layer(name for name in tensors if is_moment(name) == moments).values()
    ]


def files_of(tensors: Mapping[str, TensorSpec], tp: int) -> dict[str, dict[str, TensorSpec]]:
    """File name -> the parts in it, for whole `tensors` cut for `tp` ranks.

    Raises: ValueError if one cannot be cut so.
    """
    return {
        file_of(next(iter(held)), rank, tp): parts
        for held in sets_of(tensors)
        for rank in range(tp)
        if (parts := parts_of(held, rank, tp))
    }


def parts_of(tensors: Mapping[str, TensorSpec], rank: int, tp: int) -> dict[str, TensorSpec]:
    """What the files of `rank` hold of `tensors`.

    Raises: ValueError if one cannot be cut for `tp` ranks.
    """
    parts = {}
    for name, spec in tensors.items():
        shard = shard_for(name)
        if rank == 0 or shard.dim is not None:
            try:
                parts[name] = TensorSpec(spec.dtype, part_shape(spec.shape, shard, rank, tp))
            except ValueError as error:
                raise ValueError(f"{name} does not fit --tp {tp}: {error}") from None
    return parts


class Parts(Source):
    """Reads a folder of parts. Whatever it reads is checked, and little more is read.

    Rows are read and checked alone, in blocks of 1 MiB. Columns lie scattered over a file, so for
    them whole rows are read, a band at a time.

    Args:
        manifest: what it holds; any folder's is `read_manifest`.

    Raises:
        FileNotFoundError: if a file is missing.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.path = folder
        self.tp = manifest.tp
        self.tensors = manifest.tensors
        self._seals = manifest.seals
        self._contents = files_of(manifest.tensors, manifest.tp)
        self._opened: dict[str, PartFile] = {}
        self._lock = Lock()
        for file in self._contents:
            if file not in self._seals or not (folder / file).is_file():
                raise FileNotFoundError(f"{folder / file} is missing; copy the whole folder again")

    @property
    def part_files(self) -> list[str]:
        """Names of the files, the manifest apart."""
        return list(self._contents)

    def read(self, name: str) -> Tensor:
        return self.read_part(name, 0, 1)

    def read_part(
        self, name: str, rank: int, size: int, start: int = 0, stop: int | None = None
    ) -> Tensor:
        shard = shard_for(name)
        shape = part_shape(self.tensors[name].shape, shard, rank, size) or (1,)
        stop = shape[0] if stop is None else stop
        if shard.dim is None:
            return self._file(name, 0).read(name, start, stop)
        plan = slice_plan(self.tensors[name].shape[shard.dim], shard, rank, size, self.tp)
        if shard.dim == 0:
            pieces = [
                self._file(name, piece.rank).read(name, piece.start, piece.stop)
                for piece in _within(plan, start, stop)
            ]
        else:
            pieces = [
                self._file(name, piece.rank).read_columns(
                    name, piece.start, piece.stop, start, stop
                )
                for piece in plan
            ]
        if not pieces:
            return torch.empty((0, *shape[1:]), dtype=self.tensors[name].dtype)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, shard.dim)

    def verify_file(self, file: str) -> None:
        """Read and check all of one of `part_files`.

        Raises: ValueError if it is damaged.
        """
        self._open(file).verify()

    def _file(self, name: str, rank: int) -> PartFile:
        return self._open(file_of(name, rank, self.tp))

    def _open(self, file: str) -> PartFile:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = PartFile(
                    self.path / file, self._seals[file], self._contents[file]
                )
            return self._opened[file]


def open_parts(manifest: Path) -> Parts:
    """The folder of parts around a manifest.

    Raises: ValueError if the manifest is damaged; FileNotFoundError if a file is missing.
    """
    return Parts(manifest.parent, read_manifest(manifest))


def _within(plan: list[Piece], start: int, stop: int) -> Iterator[Piece]:
    """The pieces that make up [start, stop) of what `plan` makes."""
    offset = 0
    for piece in plan:
        count = piece.stop - piece.start
        low, high = max(start - offset, 0), min(stop - offset, count)
        if low < high:
            yield Piece(piece.rank, piece.start + low, piece.start + high)
        offset += count
