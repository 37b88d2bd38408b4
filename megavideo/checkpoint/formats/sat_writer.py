"""SAT checkpoints written: one .pt file a model-parallel rank, all in one pass over the tensors."""

from collections.abc import Mapping
from pathlib import Path

from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.formats.interface import Group, OpenGroup, Writer, by_layer, is_moment
from megavideo.checkpoint.formats.pt_stream import STORAGES, PtSink, StandIn
from megavideo.checkpoint.formats.sat import sat_name
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.files import atomic_write, fsync_dir
from megavideo.model.table import shard_named
from megavideo.parallel.shard import part_shape


class SatWriter(Writer):
    """Writes weights for `tp` model-parallel ranks, as of `iteration`."""

    format = "sat"

    def __init__(self, tp: int, iteration: int):
        self.tp = tp
        self.iteration = iteration

    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        for name, spec in tensors.items():
            assert not is_moment(name), "SAT's format holds no optimizer state"
            if spec.dtype not in STORAGES:
                raise ValueError(f"{name} has type {spec.dtype}; choose one with --dtype")
            self._part(name, spec, rank=0)
        names = [name for layer in by_layer(tensors).values() for name in layer]
        ranks = range(self.tp)
        files = (f"{self.iteration}/mp_rank_{rank:02d}_model_states.pt" for rank in ranks)
        return [Group(tuple(files), tuple(names))]

    def open(self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]) -> OpenGroup:
        sinks = []
        for rank, file in enumerate(group.files):
            parts = {n: StandIn(n, self._part(n, tensors[n], rank)) for n in group.tensors}
            module = {sat_name(name): part for name, part in parts.items()}
            content = {"iteration": self.iteration, "module": module}
            sinks.append(PtSink(folder / file, content))
        return OpenGroup(sinks)

    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        fsync_dir(folder / str(self.iteration))
        with atomic_write(folder / "latest") as file:
            file.write(str(self.iteration).encode())

    def _part(self, name: str, spec: TensorSpec, rank: int) -> TensorSpec:
        """Unlike us, SAT has no ranks with fewer rows than others."""
        shard = shard_named(name)
        try:
            parts = [part_shape(spec.shape, shard, r, self.tp) for r in (rank, self.tp - 1)]
        except ValueError as error:
            raise ValueError(f"{name} does not fit --tp {self.tp}: {error}") from None
        if parts[0] != parts[1]:
            raise ValueError(
                f"{name} has {spec.shape[0]} rows, which --tp {self.tp} does not divide, as SAT "
                "needs; choose another --tp"
            )
        return TensorSpec(spec.dtype, parts[0])
