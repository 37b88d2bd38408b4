"""Checkpoints of training runs: what was trained, its moments, and the frozen base beside them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from megavideo.checkpoint.base import base_path
from megavideo.checkpoint.commit import LATEST, checkpoints_of
from megavideo.checkpoint.files import TensorEntry, combined_digest, opened, tensor_entry
from megavideo.checkpoint.formats.interface import Group, Reader, Write, Writer, is_moment
from megavideo.checkpoint.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from megavideo.checkpoint.sources import OPTIMIZER, WEIGHTS, run_of
from megavideo.checkpoint.tensor_stream import (
    TensorSpec,
    file_order,
    read_specs,
    safetensors_writer,
)
from megavideo.files import atomic_write, fsync_dir
from megavideo.model.trainable import is_trainable


class RunReader(Reader):
    """Reads one checkpoint and its base, checking every tensor against its digest."""

    format = "run"

    def __init__(self, checkpoint: Path):
        """Raises: ValueError if it is damaged; FileNotFoundError if the base is missing."""
        self.path = run_of(checkpoint)
        self.training = read_manifest(checkpoint)
        self._entries: dict[str, TensorEntry] = {}
        self._file_of: dict[str, Path] = {}
        for file_name, entries in self.training.files.items():
            self._add(checkpoint.resolve() / file_name, entries)
        if self.training.base is not None:
            path = base_path(self.path, self.training.base)
            self._add(path, _base_entries(path, self.training.base))
        self.tensors = {}
        for file in set(self._file_of.values()):
            self.tensors |= read_specs(file)
        files = [checkpoint.resolve() / MANIFEST, *sorted(set(self._file_of.values()))]
        self.files = [file.relative_to(self.path) for file in files]

    def _add(self, path: Path, entries: Mapping[str, TensorEntry]) -> None:
        self._entries |= entries
        self._file_of |= dict.fromkeys(entries, path)

    def read(self, name: str) -> Tensor:
        with opened(self._file_of[name]) as file:
            tensor = file.get_tensor(name)
        if tensor_entry(tensor) != self._entries[name]:
            raise ValueError(f"{self._file_of[name]} is damaged: {name} differs from its digest")
        return tensor


class RunWriter(Writer):
    """Writes a run's folder with one checkpoint, from which `megavideo train` goes on."""

    format = "run"

    def __init__(self, training: Manifest):
        self.training = training
        checkpoint = checkpoints_of(Path()) / f"step-{training.progress.step:08d}"
        self._checkpoint = checkpoint
        self._weights, self._moments = str(checkpoint / WEIGHTS), str(checkpoint / OPTIMIZER)

    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        held: dict[str, dict[str, TensorSpec]] = {self._weights: {}, self._moments: {}}
        for name, spec in tensors.items():
            held.setdefault(self._file_of(name), {})[name] = spec
        return [Group((file,), tuple(file_order(specs))) for file, specs in held.items()]

    def writing(
        self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]
    ) -> AbstractContextManager[Write]:
        path = folder / group.files[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        return safetensors_writer(path, {name: tensors[name] for name in group.tensors})

    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        files: dict[str, dict[str, TensorEntry]] = {self._weights: {}, self._moments: {}}
        for name, entry in entries.items():
            files.setdefault(self._file_of(name), {})[name] = entry
        trained = {Path(file).name: files.pop(file) for file in (self._weights, self._moments)}
        for base in files.values():
            if combined_digest(base) != self.training.base:
                raise ValueError(f"the frozen weights are not the base {self.training.base}")
        write_manifest(folder / self._checkpoint, replace(self.training, files=trained))
        fsync_dir(folder / self._checkpoint)
        with atomic_write(folder / self._checkpoint.parent / LATEST) as file:
            file.write(f"{self._checkpoint.name}\n".encode())

    def _file_of(self, name: str) -> str:
        if is_moment(name):
            return self._moments
        if is_trainable(name, self.training.stage):
            return self._weights
        assert self.training.base is not None, f"{name} is frozen, but the run has no base"
        return str(base_path(Path(), self.training.base))


def _base_entries(path: Path, digest: str) -> dict[str, TensorEntry]:
    """Entries of the base at `path`, read through once because its name is its only digest."""
    if not path.is_file():
        raise FileNotFoundError(f"the frozen base {path} is missing; copy it back")
    entries = {}
    for name in read_specs(path):
        with opened(path) as file:
            entries[name] = tensor_entry(file.get_tensor(name))
    if combined_digest(entries) != digest:
        raise ValueError(f"{path} is damaged: its content does not have the digest in its name")
    return entries
