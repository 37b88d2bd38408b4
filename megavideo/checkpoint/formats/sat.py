"""SAT checkpoints, the format of CogView2 and CogVideo: `latest`, `<n>/mp_rank_00_*.pt`, ...

One file a model-parallel rank. Nothing is unpickled but tensors and the few types that SAT's random
states hold.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct
from numpy.dtypes import UInt32DType
from torch import Tensor

from megavideo.checkpoint.formats.interface import Reader
from megavideo.checkpoint.formats.names import to_ours, to_theirs
from megavideo.checkpoint.formats.pt_stream import (
    PtFile,
    check_same_names,
    named_errors,
    whole_spec,
)
from megavideo.checkpoint.tensor_stream import joined
from megavideo.model.table import shard_named

# SAT's name of a tensor -> our canonical one. Layer numbers stand for {i}.
NAMES = {
    "transformer.word_embeddings.weight": "embedding.word",
    "transformer.position_embeddings.weight": "embedding.position",
    "transformer.layers.{i}.input_layernorm": "layers.{i}.input_norm",
    "transformer.layers.{i}.attention.query_key_value": "layers.{i}.attention.spatial.qkv",
    "transformer.layers.{i}.attention.dense": "layers.{i}.attention.spatial.dense",
    "transformer.layers.{i}.third_layernorm": "layers.{i}.attention_norm",
    "transformer.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "transformer.layers.{i}.mlp.dense_h_to_4h": "layers.{i}.mlp.up",
    "transformer.layers.{i}.mlp.dense_4h_to_h": "layers.{i}.mlp.down",
    "transformer.layers.{i}.fourth_layernorm": "layers.{i}.mlp_output_norm",
    "transformer.final_layernorm": "head.norm",
    "mixins.extra_position_embedding.position_embeddings.weight": "embedding.frame_position",
    "mixins.attention_plus.query_key_value.{i}": "layers.{i}.attention.temporal.qkv",
    "mixins.attention_plus.dense.{i}": "layers.{i}.attention.temporal.dense",
    "mixins.attention_plus.attn_distribution.{i}": "layers.{i}.attention.mixture",
}

# Before version 0.1, SAT numbered its mixins.
OLD_PREFIXES = {
    "mixins.0.": "mixins.extra_position_embedding.",
    "mixins.1.": "mixins.attention_plus.",
}

# Besides tensors, SAT's files hold the random state of NumPy.
SAFE_TYPES: list[Any] = [_reconstruct, np.ndarray, np.dtype, UInt32DType]


def canonical_name(sat_name: str) -> str:
    """Our name of SAT's tensor `sat_name`.

    Raises: ValueError if the tensor is none of CogView2's or CogVideo's.
    """
    for old, new in OLD_PREFIXES.items():
        sat_name = sat_name.replace(old, new, 1) if sat_name.startswith(old) else sat_name
    ours = to_ours(NAMES, sat_name)
    if ours is None:
        raise ValueError(f"{sat_name} is no tensor of CogView2 or CogVideo in SAT's format")
    return ours


def sat_name(canonical: str) -> str:
    """SAT's name of our tensor `canonical`.

    Raises: ValueError if SAT has no such tensor.
    """
    theirs = to_theirs(NAMES, canonical)
    if theirs is None:
        raise ValueError(f"SAT's format has no tensor for {canonical}")
    return theirs


class SatReader(Reader):
    """Reads one file a model-parallel rank, checking each tensor's checksum in the zip archive."""

    format = "sat"

    def __init__(self, path: Path):
        """Raises: ValueError if it is not whole, or its ranks do not fit each other."""
        self.path = path
        files = _complete(path)
        self._ranks = [PtFile(file, SAFE_TYPES) for file in files]
        self._modules = [_module(rank) for rank in self._ranks]
        check_same_names(files, self._modules)
        ranks = list(zip(self._ranks, self._modules, strict=True))
        self._parts = {
            name: [rank.stored(module[name]) for rank, module in ranks] for name in self._modules[0]
        }
        self.tensors = {name: whole_spec(path, name, p) for name, p in self._parts.items()}
        self.files = [file.relative_to(path) for file in files]
        if (path / "latest").is_file():
            self.files.append(Path("latest"))

    def blocks(self, name: str) -> Iterator[Tensor]:
        blocks = joined(self._parts[name], shard_named(name), self.tensors[name])
        return named_errors(blocks, f"{self.path}: {name}")

    def mapped(self, name: str) -> Tensor:
        """The tensor; memory-mapped and not checked if no two ranks' parts are to be joined."""
        if len(self._ranks) > 1 and shard_named(name).dim is not None:
            return self.read(name)
        return self._modules[0][name]

    def verify_files(self) -> None:
        for rank in self._ranks:
            rank.verify_rest()


def is_sat(folder: Path) -> bool:
    """Whether `folder` looks like a SAT checkpoint (its root, or one iteration's folder)."""
    return bool(_rank_files(_iteration(folder)))


def read_sat(folder: Path) -> dict[str, Tensor]:
    """Tensors of a SAT checkpoint under canonical names, on the CPU.

    Those of one rank, and those that ranks share, are memory-mapped; parts of several are joined.

    Raises: ValueError if the folder is not whole, or its ranks do not fit each other.
    """
    reader = SatReader(folder)
    for name in reader.tensors:
        if shard_named(name).dim is None:
            reader.read(name)  # ranks that differ are an error
    return {name: reader.mapped(name) for name in reader.tensors}


def _complete(folder: Path) -> list[Path]:
    """Every rank's file.

    Raises: ValueError if one is missing.
    """
    files = _rank_files(_iteration(folder))
    wanted = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(max(1, len(files)))]
    lacking = [name for name in wanted if name not in {file.name for file in files}]
    if lacking:
        raise ValueError(
            f"{folder} holds no {lacking[0]}; name the checkpoint folder, with all its files"
        )
    return files


def _module(rank: PtFile) -> dict[str, Tensor]:
    """A rank's tensors, without values, under canonical names."""
    content = rank.content
    if not isinstance(content, dict) or not isinstance(content.get("module"), dict):
        raise ValueError(f"{rank.path} has no entry `module`; it is no SAT checkpoint")
    return {canonical_name(name): tensor for name, tensor in content["module"].items()}


def _iteration(folder: Path) -> Path:
    latest = folder / "latest"
    return folder / latest.read_text().strip() if latest.is_file() else folder


def _rank_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("mp_rank_*_model_states.pt"))
