"""A super-resolution model on disk: ours, or one that CogView2 published.

Ours is a folder: `superres.json`, sealed and written last, `weights.safetensors` with what training
changed, and `base/`, the frozen weights under their digest. Both are sealed files (part_file.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import TypeAdapter
from torch import Tensor

from megavideo.checkpoint.files import combined_digest, tensor_entry
from megavideo.checkpoint.formats.sat import SatReader, is_sat, read_sat
from megavideo.checkpoint.manifest import read_sealed, write_sealed
from megavideo.checkpoint.part_file import read_part_file, seal_of, write_part_file
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.files import atomic_path
from megavideo.superres.config import DirectConfig, IterativeConfig
from megavideo.superres.model import DirectSuperResolution, IterativeSuperResolution
from megavideo.superres.published import superres_name

FORMAT = "megavideo-superres-1"
MANIFEST = "superres.json"
WEIGHTS = "weights.safetensors"
PUBLISHED_HEAD = 64  # units of a head in every published model

SuperResolution = DirectSuperResolution | IterativeSuperResolution
Config = DirectConfig | IterativeConfig


@dataclass(frozen=True)
class Origin:
    """What a model was trained with, and for how many optimizer steps."""

    tokenizers: TokenizerDigests
    steps: int


class Shaped(Protocol):
    """A tensor, or what a file says of one."""

    @property
    def shape(self) -> Sequence[int]: ...


def save(folder: Path, model: SuperResolution, origin: Origin) -> None:
    """Write `model`: its trainable weights, and once, by content, the frozen ones."""
    (folder / MANIFEST).unlink(missing_ok=True)  # beside new weights an old one would say: damaged
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    base = combined_digest({name: tensor_entry(tensor) for name, tensor in frozen.items()})
    if not _base(folder, base).exists():
        with atomic_path(_base(folder, base)) as temporary:
            write_part_file(temporary, frozen)
    with atomic_path(folder / WEIGHTS) as temporary:
        seal = write_part_file(temporary, trained)
    body = {
        "config": model.config.model_dump(),
        "origin": asdict(origin),
        "base": base,
        "seals": {"base": seal_of(_base(folder, base)), "weights": seal},
    }
    write_sealed(folder / MANIFEST, FORMAT, body)


def load(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> SuperResolution:
    """The model in folder `path`, ours or a published one in SAT's format, for use.

    Of a published one, `model_config.json` beside it says how many heads it has; without that
    file, heads have 64 units as all published ones do.

    Raises:
        FileNotFoundError: if it is neither.
        ValueError: if it is damaged, or is no super-resolution model.
    """
    config = config_of(path)
    tensors = _read_own(path) if (path / MANIFEST).is_file() else _read_published(path)
    return _filled(config, tensors, path).to(device, dtype).eval().requires_grad_(False)


def config_of(path: Path) -> Config:
    """Kind and sizes of the model in folder `path`, without reading its weights.

    Raises: as `load`.
    """
    if (path / MANIFEST).is_file():
        body = read_sealed(path / MANIFEST, FORMAT)
        config: Config = TypeAdapter(Config).validate_python(body["config"])
        return config
    if path.is_dir() and is_sat(path):
        found = SatReader(path).tensors
        try:
            return published_config({superres_name(n): t for n, t in found.items()}, _sizes(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    raise FileNotFoundError(
        f"{path} is no super-resolution model: it has neither {MANIFEST} nor SAT's files"
    )


def origin_of(path: Path) -> Origin | None:
    """What the model in folder `path` was trained with; None for a published one."""
    if not (path / MANIFEST).is_file():
        return None
    origin = read_sealed(path / MANIFEST, FORMAT)["origin"]
    return Origin(TokenizerDigests(**origin["tokenizers"]), origin["steps"])


def _read_own(path: Path) -> dict[str, Tensor]:
    body = read_sealed(path / MANIFEST, FORMAT)
    trained = read_part_file(path / WEIGHTS, body["seals"]["weights"])
    frozen = read_part_file(_base(path, body["base"]), body["seals"]["base"])
    return {**frozen, **trained}


def _base(folder: Path, digest: str) -> Path:
    return folder / "base" / f"{digest}.safetensors"


def _read_published(path: Path) -> dict[str, Tensor]:
    return {superres_name(name): tensor for name, tensor in read_sat(path).items()}


def _sizes(path: Path) -> dict[str, Any]:
    """What `model_config.json` says; SAT keeps it in the checkpoint's folder or above."""
    for folder in (path, path.parent):
        if (folder / "model_config.json").is_file():
            return json.loads((folder / "model_config.json").read_text())
    return {}


def published_config(tensors: Mapping[str, Shaped], settings: Mapping[str, Any]) -> Config:
    """Sizes of a published model, from its tensors by our names and its model_config.json.

    Raises: ValueError if it is no super-resolution model.
    """
    if "embedding.fine_position" not in tensors:
        raise ValueError("it has no positions of fine tokens, so it is no super-resolution model")
    hidden = tensors["head.norm.weight"].shape[0]
    side = isqrt(tensors["embedding.fine_position"].shape[0])
    sizes = {
        "hidden": hidden,
        "heads": settings.get("num_attention_heads", hidden // PUBLISHED_HEAD),
        "layers": sum(name.endswith(".input_norm.weight") for name in tensors),
        "fine_side": side,
        "vocab_size": tensors["embedding.word"].shape[0],
        "position_rows": tensors["embedding.position"].shape[0],
    }
    if any(".attention.fine." in name for name in tensors):
        return DirectConfig(**sizes, coarse_side=side // 3)
    return IterativeConfig(**sizes)


def empty_model(config: Config) -> SuperResolution:
    """A model without storage, whose tensors are to be assigned."""
    with torch.device("meta"):
        if isinstance(config, DirectConfig):
            return DirectSuperResolution(config)
        return IterativeSuperResolution(config)


def _filled(config: Config, tensors: dict[str, Tensor], path: Path) -> SuperResolution:
    """A model that takes the tensors over without copying them."""
    model = empty_model(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit its sizes: {error}") from None
    return model
