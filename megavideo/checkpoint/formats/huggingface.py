"""A folder as Hugging Face lays one out: numbered safetensors files and an index of tensors."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.formats.interface import (
    Group,
    OpenGroup,
    Reader,
    Writer,
    by_layer,
)
from megavideo.checkpoint.tensor_stream import (
    SafetensorsSink,
    Stored,
    TensorSpec,
    joined,
    stored_tensors,
)
from megavideo.files import atomic_write
from megavideo.parallel.shard import REPLICATED

INDEX = "model.safetensors.index.json"


class HuggingFaceReader(Reader):
    """Reads tensors by the index. The format has no digests."""

    format = "huggingface"

    def __init__(self, path: Path):
        """Raises: ValueError if index and files do not agree; FileNotFoundError."""
        self.path = path
        file_of = _read_index(path / INDEX)
        self._stored: dict[str, Stored] = {}
        names = sorted(set(file_of.values()))
        for file in names:
            if not (path / file).is_file():
                raise FileNotFoundError(f"{path / file} is missing; {INDEX} names it")
            self._stored |= stored_tensors(path / file)
        self.tensors = {name: stored.spec for name, stored in self._stored.items()}
        odd = sorted(self.tensors.keys() ^ file_of.keys())
        if odd:
            raise ValueError(f"{path}: {INDEX} and the files disagree about {', '.join(odd)}")
        self.files = [Path(INDEX), *map(Path, names)]

    def blocks(self, name: str) -> Iterator[Tensor]:
        return joined([self._stored[name]], REPLICATED, self.tensors[name])


class HuggingFaceWriter(Writer):
    """Fills files up to `max_file_size` bytes in the model's order; a larger tensor has its own."""

    format = "huggingface"

    def __init__(self, max_file_size: int):
        self.max_file_size = max_file_size

    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        bins: list[dict[str, TensorSpec]] = []
        room = 0
        for name in (name for names in by_layer(tensors).values() for name in names):
            if not bins or tensors[name].nbytes > room:
                bins.append({})
                room = self.max_file_size
            bins[-1][name] = tensors[name]
            room -= tensors[name].nbytes
        return [
            Group((f"model-{number:05d}-of-{len(bins):05d}.safetensors",), tuple(held))
            for number, held in enumerate(bins, 1)
        ]

    def open(self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]) -> OpenGroup:
        held = {name: tensors[name] for name in group.tensors}
        return OpenGroup([SafetensorsSink(folder / group.files[0], held)])

    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        files = sorted(folder.glob("model-*.safetensors"))
        held = {file.name: stored_tensors(file) for file in files}
        size = sum(stored.spec.nbytes for tensors in held.values() for stored in tensors.values())
        index = {
            "metadata": {"total_size": size},
            "weight_map": {
                name: file for file, tensors in held.items() for name in sorted(tensors)
            },
        }
        with atomic_write(folder / INDEX) as file:
            file.write(json.dumps(index, indent=2).encode())


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        plain = all(Path(file).name == file for file in files.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if not plain:
        raise ValueError(f"{path} names files outside its folder")
    return files
