"""Our weights folder, for any number of tensor-parallel ranks: a folder of parts (see parts.py).

FOLDER/embedding.tp-00-of-02.safetensors, layers.0.tp-00-of-02.safetensors, ...
FOLDER/optimizer.layers.0.tp-00-of-02.safetensors, ...   of a training run: the moments
FOLDER/weights.json                                      the manifest, written last

It differs from a run's checkpoint in holding all weights, the frozen ones too.
"""

from collections.abc import Mapping
from pathlib import Path

from megavideo.checkpoint.files import TensorEntry, combined_digest
from megavideo.checkpoint.formats.interface import Group, OpenGroup, Reader, Writer
from megavideo.checkpoint.manifest import Manifest, Training, read_manifest, write_manifest
from megavideo.checkpoint.part_file import PartSink, seal_of
from megavideo.checkpoint.parts import Parts, file_of, files_of, parts_of, sets_of
from megavideo.checkpoint.tensor_stream import TensorSpec, file_order

WEIGHTS_MANIFEST = "weights.json"


class ShardedReader(Parts, Reader):
    """Reads whole tensors, or one rank's part at any size; either is checked."""

    format = "megavideo"

    def __init__(self, path: Path):
        """Raises: ValueError if the manifest is damaged; FileNotFoundError if a file is missing."""
        manifest = read_manifest(path / WEIGHTS_MANIFEST)
        super().__init__(path, manifest)
        self.training = manifest.training
        self.files = [*map(Path, self.part_files), Path(WEIGHTS_MANIFEST)]


class ShardedWriter(Writer):
    """Cuts every tensor for `tp` ranks; `training` goes into the manifest."""

    format = "megavideo"

    def __init__(self, tp: int, training: Training | None):
        self.tp = tp
        self.training = training

    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        groups = []
        for held in sets_of(tensors):
            names = file_order(held)
            files = (file_of(names[0], rank, self.tp) for rank in self._ranks(held))
            groups.append(Group(tuple(files), tuple(names)))
        return groups

    def open(self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]) -> OpenGroup:
        held = {name: tensors[name] for name in group.tensors}
        return OpenGroup(
            [
                PartSink(folder / file, parts_of(held, rank, self.tp))
                for rank, file in zip(self._ranks(held), group.files, strict=True)
            ]
        )

    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        write_manifest(folder / WEIGHTS_MANIFEST, self.manifest(folder, entries))

    def manifest(self, folder: Path, entries: Mapping[str, TensorEntry]) -> Manifest:
        """The manifest of the written files, which hold `entries`."""
        tensors = {name: entry.spec for name, entry in entries.items()}
        seals = {file: seal_of(folder / file) for file in files_of(tensors, self.tp)}
        return Manifest(self.tp, tensors, seals, combined_digest(entries), self.training)

    def _ranks(self, tensors: Mapping[str, TensorSpec]) -> list[int]:
        """Ranks that hold anything of `tensors`."""
        return [rank for rank in range(self.tp) if parts_of(tensors, rank, self.tp)]
