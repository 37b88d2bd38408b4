"""A manifest says what a folder of parts holds, and is checked against itself. Written last."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.checkpoint.tokenizers import TokenizerDigests, check_tokenizers
from megavideo.files import atomic_write

MANIFEST = "manifest.json"
FORMAT = "megavideo-parts-1"


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
class Training:
    """Where a training run stands.

    Attributes:
        config: the run's resolved configuration.
        data: fingerprint of the training data and its order.
        base: digest of the frozen weights (a folder in the run's `base/`); None if none are frozen.
        loss_scaler: fp16's dynamic loss scale; None in other precisions.
        tokenizers: that made the data; None if it was made up.
    """

    progress: Progress
    config: dict[str, Any]
    data: str
    base: str | None
    loss_scaler: dict[str, float] | None
    tokenizers: TokenizerDigests | None = None

    @property
    def stage(self) -> str:
        """The recipe's stage: image, keyframes or interpolation."""
        return self.config["recipe"]["stage"]


@dataclass(frozen=True)
class Manifest:
    """Everything about a folder of parts but its tensors' values.

    Attributes:
        tp: tensor-parallel ranks that the tensors are cut for.
        tensors: what the files hold together, by canonical name; parts.py says which where.
        seals: file name -> its seal (part_file.py), by which any slice of it can be checked.
        content: `combined_digest` of the whole tensors, whatever their cut: a base's name. None in
            a checkpoint, whose writers hold parts only.
        training: of a checkpoint, where the run stands; None for bare weights.
    """

    tp: int
    tensors: dict[str, TensorSpec]
    seals: dict[str, str]
    content: str | None = None
    training: Training | None = None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest to `path`; it is whole or absent, and makes the files beside it valid."""
    tensors = {
        name: {"dtype": str(spec.dtype).removeprefix("torch."), "shape": spec.shape}
        for name, spec in sorted(manifest.tensors.items())
    }
    body = {
        "tp": manifest.tp,
        "tensors": tensors,
        "seals": dict(sorted(manifest.seals.items())),
        "content": manifest.content,
        "training": manifest.training and asdict(manifest.training),
    }
    write_sealed(path, FORMAT, body)


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest at `path`.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no checkpoint: it has no {path.name}")
    body = read_sealed(path, FORMAT)
    tensors = {
        name: TensorSpec(getattr(torch, spec["dtype"]), tuple(spec["shape"]))
        for name, spec in body["tensors"].items()
    }
    training = None if body["training"] is None else _training(body["training"])
    return Manifest(body["tp"], tensors, body["seals"], body["content"], training)


def read_training(checkpoint: Path) -> Training:
    """Where the run stood at the checkpoint in the folder `checkpoint`.

    Raises: as `read_manifest`.
    """
    training = read_manifest(checkpoint / MANIFEST).training
    assert training is not None, "a run's checkpoints say where it stood"
    return training


def check_learned_from(checkpoint: Path, ours: TokenizerDigests, remedy: str) -> None:
    """Refuse tokens of other tokenizers than those that the run of `checkpoint` learned from.

    Raises: ValueError, as `check_tokenizers`.
    """
    check_tokenizers(checkpoint, read_training(checkpoint).tokenizers, ours, remedy)


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
        raise ValueError(f"{path} has format {found!r}; this version reads only {kind!r}")
    return body


def entries_from_json(body: dict[str, Any]) -> dict[str, TensorEntry]:
    """Tensor entries by name from the JSON of their `asdict`."""
    return {
        name: TensorEntry(entry["dtype"], tuple(entry["shape"]), entry["digest"])
        for name, entry in body.items()
    }


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def training_text(training: Training | None) -> str | None:
    """Where a run stands as a text, for files of other formats: equal for equal runs."""
    return None if training is None else json.dumps(asdict(training))


def training_from_text(text: str | None) -> Training | None:
    """What `training_text` was made of."""
    return None if text is None else _training(json.loads(text))


def _training(body: dict[str, Any]) -> Training:
    tokenizers = body.get("tokenizers")
    return Training(
        **{
            **body,
            "progress": Progress(**body["progress"]),
            "tokenizers": None if tokenizers is None else TokenizerDigests(**tokenizers),
        }
    )
