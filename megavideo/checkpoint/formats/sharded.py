"""Our weights folder, cut for any number of tensor-parallel ranks: a file per layer and rank.

FOLDER/embedding.tp-00-of-02.safetensors, layers.0.tp-00-of-02.safetensors, ...
FOLDER/optimizer.layers.0.tp-00-of-02.safetensors, ...   of a training run: the moments
FOLDER/weights.json                                      the manifest, written last

Rank r's parts lie in the files of rank r; a tensor that is not cut lies in those of rank 0, once.
The manifest's digests are of whole tensors: they do not depend on the cut.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from megavideo.checkpoint.files import TensorEntry, opened, tensor_entry
from megavideo.checkpoint.formats.interface import (
    Group,
    Reader,
    Write,
    Writer,
    by_layer,
    is_moment,
    shard_for,
)
from megavideo.checkpoint.manifest import (
    Manifest,
    entries_from_json,
    manifest_from_json,
    read_sealed,
    write_sealed,
)
from megavideo.checkpoint.tensor_stream import TensorSpec, file_order, safetensors_writer
from megavideo.model.table import layer_of
from megavideo.parallel.shard import Piece, cut, part_shape, slice_plan

WEIGHTS_MANIFEST = "weights.json"
FORMAT = "megavideo-weights-1"


class ShardedReader(Reader):
    """Reads whole tensors, checking each against its digest, or one rank's part at any size."""

    format = "megavideo"

    def __init__(self, path: Path):
        """Raises: ValueError if the manifest is damaged; FileNotFoundError if a file is missing."""
        body = read_sealed(path / WEIGHTS_MANIFEST, FORMAT)
        self.path = path
        self.tp: int = body["tp"]
        self.entries = entries_from_json(body["tensors"])
        self.tensors = {
            name: TensorSpec(getattr(torch, entry.dtype), entry.shape)
            for name, entry in self.entries.items()
        }
        self.training = None if body["training"] is None else manifest_from_json(body["training"])
        groups = ShardedWriter(self.tp, self.training).groups(self.tensors)
        self.files = [Path(file) for group in groups for file in group.files]
        for file in self.files:
            if not (path / file).is_file():
                raise FileNotFoundError(f"{path / file} is missing; copy the whole folder again")
        self.files.append(Path(WEIGHTS_MANIFEST))

    def read(self, name: str) -> Tensor:
        tensor = self.read_part(name, 0, 1)
        if tensor_entry(tensor) != self.entries[name]:
            raise ValueError(f"{self.path} is damaged: {name} differs from its digest")
        return tensor

    def read_part(self, name: str, rank: int, size: int) -> Tensor:
        """What `rank` of `size` tensor-parallel ranks holds of `name`; no other bytes are read.

        Parts have no digests; `read` every tensor once (`checkpoint verify`) before trusting them.

        Raises: ValueError if a file is damaged, or the tensor cannot be cut so.
        """
        shard = shard_for(name)
        if shard.dim is None:
            with opened(self.path / file_of(name, 0, self.tp)) as file:
                return file.get_tensor(name)
        plan = slice_plan(self.tensors[name].shape[shard.dim], shard, rank, size, self.tp)
        pieces = [self._piece(name, shard.dim, piece) for piece in plan or [Piece(0, 0, 0)]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, shard.dim)

    def _piece(self, name: str, dim: int, piece: Piece) -> Tensor:
        with opened(self.path / file_of(name, piece.rank, self.tp)) as file:
            stored, rows = file.get_slice(name), slice(piece.start, piece.stop)
            return stored[rows] if dim == 0 else stored[:, rows]


class ShardedWriter(Writer):
    """Cuts every tensor for `tp` ranks; `training` goes into the manifest."""

    format = "megavideo"

    def __init__(self, tp: int, training: Manifest | None):
        self.tp = tp
        self.training = None if training is None else replace(training, files={})

    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        groups = []
        for moments in (False, True):
            for names in by_layer(name for name in tensors if is_moment(name) == moments).values():
                held = {name: tensors[name] for name in names}
                files = (file_of(names[0], r, self.tp) for r in self._ranks(held))
                groups.append(Group(tuple(files), tuple(file_order(held))))
        return groups

    @contextmanager
    def writing(
        self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]
    ) -> Iterator[Write]:
        held = {name: tensors[name] for name in group.tensors}
        with ExitStack() as stack:
            writes = {
                rank: stack.enter_context(
                    safetensors_writer(folder / file, _parts(held, rank, self.tp))
                )
                for rank, file in zip(self._ranks(held), group.files, strict=True)
            }

            def write(name: str, whole: Tensor) -> None:
                shard = shard_for(name)
                for rank in range(self.tp if shard.dim is not None else 1):
                    writes[rank](name, cut(whole, shard, rank, self.tp))

            yield write

    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        body = {
            "tp": self.tp,
            "tensors": {name: asdict(entry) for name, entry in sorted(entries.items())},
            "training": self.training and asdict(self.training),
        }
        write_sealed(folder / WEIGHTS_MANIFEST, FORMAT, body)

    def _ranks(self, tensors: Mapping[str, TensorSpec]) -> list[int]:
        """Ranks that hold anything of `tensors`."""
        return [rank for rank in range(self.tp) if _parts(tensors, rank, self.tp)]


def file_of(name: str, rank: int, tp: int) -> str:
    """The file in which `rank` keeps its part of the weight or moment `name`."""
    kind = "optimizer." if is_moment(name) else ""
    return f"{kind}{layer_of(name)}.tp-{rank:02d}-of-{tp:02d}.safetensors"


def _parts(tensors: Mapping[str, TensorSpec], rank: int, tp: int) -> dict[str, TensorSpec]:
    """What the file of `rank` holds."""
    parts = {}
    for name, spec in tensors.items():
        shard = shard_for(name)
        if rank == 0 or shard.dim is not None:
            try:
                parts[name] = TensorSpec(spec.dtype, part_shape(spec.shape, shard, rank, tp))
            except ValueError as error:
                raise ValueError(f"{name} does not fit --tp {tp}: {error}") from None
    return parts
