"""A checkpoint's manifest: what it holds, checked against itself. Written last, as the commit."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megavideo.checkpoint.files import TensorEntry
from megavideo.files import atomic_write

MANIFEST = "manifest.json"
FORMAT = "megavideo-checkpoint-1"


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: batches drawn, skipped steps included.
        updates: optimizer steps that were applied; the learning rate follows these.
        consumed_samples: samples drawn, over all ranks: where the data goes on.
    """

    step: int = 0
    updates: int = 0
    consumed_samples: int = 0


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint but its tensors' values.

    Attributes:
        config: the run's resolved configuration.
        data: fingerprint of the training data and its order.
        base: digest of the frozen weights (a file in the run's `base/`); None if none are frozen.
        loss_scaler: fp16's dynamic loss scale; None in other precisions.
        files: file name -> tensor name -> what it must be.
    """

    progress: Progress
    config: dict[str, Any]
    data: str
    base: str | None
    loss_scaler: dict[str, float] | None
    files: dict[str, dict[str, TensorEntry]]

    @property
    def stage(self) -> str:
        """The recipe's stage: image, keyframes or interpolation."""
        return self.config["recipe"]["stage"]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `folder`/manifest.json; it is whole or absent."""
    write_sealed(folder / MANIFEST, FORMAT, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder`/manifest.json.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another format.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no {MANIFEST}")
    return manifest_from_json(read_sealed(folder / MANIFEST, FORMAT))


def write_sealed(path: Path, kind: str, body: dict[str, Any]) -> None:
    """Write `body` as JSON together with its format and its own digest; whole or absent."""
    body = {"format": kind, **body}
    with atomic_write(path) as file:
        file.write(json.dumps({**body, "digest": _digest(body)}, indent=1).encode())


def read_sealed(path: Path, kind: str) -> dict[str, Any]:
    """Read back what `write_sealed` wrote.

    Raises:
        ValueError: if it is damaged or of another format.
    """
    try:
        body = json.loads(path.read_bytes())
        digest = body.pop("digest")
        found = body.pop("format")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    if digest != _digest({"format": found, **body}):
        raise ValueError(f"{path} is damaged: it differs from its own digest")
    if found != kind:
        raise ValueError(f"{path} has format {found!r}; this version reads {kind!r}")
    return body


def manifest_from_json(body: dict[str, Any]) -> Manifest:
    """A manifest from the JSON of its `asdict`."""
    files = {file: entries_from_json(entries) for file, entries in body["files"].items()}
    return Manifest(**{**body, "files": files, "progress": Progress(**body["progress"])})


def entries_from_json(body: dict[str, Any]) -> dict[str, TensorEntry]:
    """Tensor entries by name from the JSON of their `asdict`."""
    return {
        name: TensorEntry(entry["dtype"], tuple(entry["shape"]), entry["digest"])
        for name, entry in body.items()
    }


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())
