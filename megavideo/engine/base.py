"""Storing the frozen base in the run's folder: once, by all ranks, one tensor at a time."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megavideo.checkpoint.base import base_path
from megavideo.checkpoint.commit import check_written
from megavideo.checkpoint.files import TensorSpec
from megavideo.checkpoint.formats.sharded import WEIGHTS_MANIFEST
from megavideo.checkpoint.manifest import Manifest, write_manifest
from megavideo.checkpoint.part_file import part_writer, seal_of
from megavideo.checkpoint.tensor_stream import file_order
from megavideo.engine.frozen import FrozenWeights
from megavideo.engine.part_plan import PlannedFile, planned_files, without_padding
from megavideo.files import fsync_dir


def store_base(frozen: FrozenWeights, tensors: dict[str, TensorSpec], run: Path) -> None:
    """Write the frozen weights into the run's folder, unless an earlier start did. Collective.

    Args:
        tensors: what is frozen of the whole model.

    Raises:
        ValueError: if they cannot be written; the world has ended then.
    """
    world, digest = frozen.world, frozen.digest
    if digest is None:
        return
    folder = base_path(run, digest)
    if world.from_rank_zero(folder.exists):
        return
    temporary = folder.with_name(f".tmp-{digest}")
    world.from_rank_zero(lambda: _make_empty(temporary))
    seals = _write_parts(frozen, tensors, temporary)
    manifest = Manifest(world.mesh.tp.size, tensors, seals, content=digest)
    world.from_rank_zero(lambda: _commit(temporary, folder, manifest))


def _write_parts(
    frozen: FrozenWeights, tensors: dict[str, TensorSpec], folder: Path
) -> dict[str, str]:
    """Write this rank's files; the seals of everybody's."""
    world = frozen.world
    seals: dict[str, str] = {}
    problems = []
    for file in planned_files(tensors, frozen.names, world.mesh):
        parts = frozen.parts(file_order(file.parts))
        if file.owner == world.mesh.dp.rank:
            try:
                seals[file.name] = _write_file(folder / file.name, file, parts)
            except OSError as error:  # told below: first the others need this rank to gather
                problems.append(error)
        for _ in parts:  # parts that others write are gathered with this rank's help (ZeRO 3)
            pass
    world.together(lambda: _raise_first(problems))
    return {name: seal for some in world.gathered(seals) for name, seal in some.items()}


def _write_file(path: Path, file: PlannedFile, parts: Iterator[tuple[str, Tensor]]) -> str:
    with part_writer(path, file.parts) as write:
        for name, part in parts:
            write(name, without_padding(part, file.parts[name].shape))
    return seal_of(path)


def _raise_first(problems: list[OSError]) -> None:
    if problems:
        raise problems[0]


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _commit(temporary: Path, folder: Path, manifest: Manifest) -> None:
    check_written(temporary, manifest)
    write_manifest(temporary / WEIGHTS_MANIFEST, manifest)
    fsync_dir(temporary)
    os.replace(temporary, folder)
    fsync_dir(folder.parent)
