"""Which files of a folder of parts this rank writes: everything is written once, work is shared.

A tensor-parallel rank's files can be written by any of its replicas, so they take turns, file by
file. Of pipeline stages, the one that holds all of a file's tensors writes it.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from megavideo.checkpoint.files import TensorSpec
from megavideo.checkpoint.formats.interface import MOMENTS
from megavideo.checkpoint.parts import file_of, parts_of, sets_of
from megavideo.config.schema import Config
from megavideo.model.table import parameter_table
from megavideo.parallel.mesh import Mesh
from megavideo.parallel.shard import Shape


@dataclass(frozen=True)
class PlannedFile:
    """A file, the parts in it, and the data-parallel rank that writes it."""

    name: str
    parts: dict[str, TensorSpec]
    owner: int


def planned_files(
    tensors: Mapping[str, TensorSpec], held: Set[str], mesh: Mesh
) -> Iterator[PlannedFile]:
    """The files of this rank and its replicas, all of which get the same answer.

    Args:
        tensors: the whole tensors of the whole model that the folder is to hold.
        held: names of those that this pipeline stage holds.
    """
    for number, together in enumerate(sets_of(tensors)):
        parts = parts_of(together, mesh.tp.rank, mesh.tp.size)
        if parts and together.keys() <= held:
            name = file_of(next(iter(together)), mesh.tp.rank, mesh.tp.size)
            yield PlannedFile(name, parts, number % mesh.dp.size)


def trained_tensors(config: Config) -> dict[str, TensorSpec]:
    """What a checkpoint of the whole model holds: float32 weights and their moments."""
    table = parameter_table(config.model, config.recipe)
    weights = {r.name: TensorSpec(torch.float32, r.shape) for r in table if r.trainable}
    moments = () if config.recipe.optimizer.name == "sgd" else MOMENTS
    return weights | {f"{name}{m}": spec for name, spec in weights.items() for m in moments}


def frozen_tensors(config: Config, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """What the base of the whole model holds."""
    table = parameter_table(config.model, config.recipe)
    return {row.name: TensorSpec(dtype, row.shape) for row in table if not row.trainable}


def without_padding(part: Tensor, shape: Shape) -> Tensor:
    """The first rows (or columns) of `part`, as many as `shape` has; a view."""
    for dim, length in enumerate(shape):
        part = part.narrow(dim, 0, length)
    return part
