"""Training runs: what was trained and its moments in a checkpoint, the frozen base beside it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from megavideo.checkpoint.base import base_path, open_base
from megavideo.checkpoint.commit import LATEST, checkpoints_of, folder_name, in_its_run
from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.formats.interface import Group, OpenGroup, Reader, Writer, is_moment
from megavideo.checkpoint.formats.sharded import WEIGHTS_MANIFEST, ShardedWriter
from megavideo.checkpoint.manifest import MANIFEST, Training, read_manifest, write_manifest
from megavideo.checkpoint.parts import Parts
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.files import atomic_write, fsync_dir
from megavideo.model.trainable import is_trainable

T = TypeVar("T")


class RunReader(Reader):
    """Reads one checkpoint of a run, and its base."""

    format = "run"
    training: Training

    def __init__(self, checkpoint: Path):
        """Raises: ValueError if it is damaged; FileNotFoundError if a file is missing."""
        checkpoint = in_its_run(checkpoint)
        manifest = read_manifest(checkpoint / MANIFEST)
        assert manifest.training is not None, "a run's checkpoints say where it stood"
        self.path = checkpoint.parent.parent
        self.training = manifest.training
        self.trained = Parts(checkpoint, manifest)
        base = self.training.base
        self.frozen = open_base(self.path, base) if base else None
        folders = [(self.trained, MANIFEST)]
        if self.frozen:
            folders.append((self.frozen, WEIGHTS_MANIFEST))
        self._parts_of = {name: parts for parts, _ in folders for name in parts.tensors}
        self.tensors = {n: spec for parts, _ in folders for n, spec in parts.tensors.items()}
        self.files = [
            (parts.path / file).relative_to(self.path)
            for parts, manifest_name in folders
            for file in (manifest_name, *parts.part_files)
        ]

    def read(self, name: str) -> Tensor:
        return self._parts_of[name].read(name)

    def read_part(
        self, name: str, rank: int, size: int, start: int = 0, stop: int | None = None
    ) -> Tensor:
        return self._parts_of[name].read_part(name, rank, size, start, stop)


class RunWriter(Writer):
    """Writes a run's folder with one checkpoint, from which `megavideo train` goes on.

    Args:
        tp: ranks to cut for. Training in any layout reads any cut; its own reads fastest.
    """

    format = "run"

    def __init__(self, tp: int, training: Training):
        self.training = training
        self._parts = ShardedWriter(tp, None)
        self._trained = checkpoints_of(Path()) / folder_name(training.progress.step)
        self._frozen = base_path(Path(), training.base) if training.base else None

    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        return [
            Group(tuple(str(folder / file) for file in group.files), group.tensors)
            for folder, held in self._by_folder(tensors).items()
            for group in self._parts.groups(held)
        ]

    def open(self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]) -> OpenGroup:
        return self._parts.open(folder, group, tensors)

    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        for inner, held in self._by_folder(entries).items():
            manifest = self._parts.manifest(folder / inner, held)
            if inner == self._trained:
                manifest = replace(manifest, content=None, training=self.training)
                write_manifest(folder / inner / MANIFEST, manifest)
            elif manifest.content != self.training.base:
                raise ValueError(f"the frozen weights are not the base {self.training.base}")
            else:
                write_manifest(folder / inner / WEIGHTS_MANIFEST, manifest)
            fsync_dir(folder / inner)
        with atomic_write(folder / self._trained.parent / LATEST) as file:
            file.write(f"{self._trained.name}\n".encode())

    def _by_folder(self, tensors: Mapping[str, T]) -> dict[Path, dict[str, T]]:
        folders: dict[Path, dict[str, T]] = {}
        for name, tensor in tensors.items():
            trained = is_moment(name) or is_trainable(name, self.training.stage)
            folder = self._trained if trained else self._frozen
            assert folder is not None, f"{name} is frozen, but the run has no base"
            folders.setdefault(folder, {})[name] = tensor
        return folders
