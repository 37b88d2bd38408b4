"""SAT checkpoints, the format of CogView2 and CogVideo: `latest`, `<n>/mp_rank_00_*.pt`, ...

One file a model-parallel rank. Nothing is unpickled but tensors and the few types that SAT's random
states hold.
"""

import pickle
import re
import zipfile
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from numpy.dtypes import UInt32DType
from torch import Tensor

from megavideo.checkpoint.formats.interface import Reader
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.model.table import shard_named
from megavideo.parallel.shard import join, whole_shape

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
    for theirs, ours in NAMES.items():
        pattern = re.escape(theirs).replace(re.escape("{i}"), r"(?P<i>\d+)")
        match = re.fullmatch(rf"{pattern}(?P<part>\.weight|\.bias)?", sat_name)
        if match:
            return ours.replace("{i}", match.groupdict().get("i") or "") + (match["part"] or "")
    raise ValueError(f"{sat_name} is no tensor of CogView2 or CogVideo in SAT's format")


def sat_name(canonical: str) -> str:
    """SAT's name of our tensor `canonical`.

    Raises: ValueError if SAT has no such tensor.
    """
    for theirs, ours in NAMES.items():
        pattern = re.escape(ours).replace(re.escape("{i}"), r"(?P<i>\d+)")
        match = re.fullmatch(rf"{pattern}(?P<part>\.weight|\.bias)?", canonical)
        if match:
            return theirs.replace("{i}", match.groupdict().get("i") or "") + (match["part"] or "")
    raise ValueError(f"SAT's format has no tensor for {canonical}")


class SatReader(Reader):
    """Reads whole tensors out of one file a model-parallel rank. The format has no digests.

    What was read of a memory-mapped file counts as this process's memory until the map is dropped;
    so the files are mapped anew whenever as many bytes were read as the largest tensor has.
    """

    format = "sat"

    def __init__(self, path: Path):
        """Raises: ValueError if it is not whole, or its ranks do not fit each other."""
        self.path = path
        self._ranks = _load(path)
        self.tensors = {name: self._spec(name) for name in self._ranks[0]}
        self._largest = max((spec.nbytes for spec in self.tensors.values()), default=0)
        self._mapped = 0
        self._lock = Lock()
        self.files = [file.relative_to(path) for file in _rank_files(_iteration(path))]
        if (path / "latest").is_file():
            self.files.append(Path("latest"))

    def read(self, name: str) -> Tensor:
        with self._lock:
            self._mapped += self.tensors[name].nbytes
            if self._mapped > self._largest:
                self._ranks = _load(self.path)
                self._mapped = self.tensors[name].nbytes
            whole = _join(self._ranks, name, self.path)
            is_copy = len(self._ranks) > 1 and shard_named(name).dim is not None
            return whole if is_copy else whole.clone()

    def verify_files(self) -> None:
        """Check the checksums that a .pt file has for being a zip archive."""
        for file in _rank_files(_iteration(self.path)):
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"{file} is damaged: the checksum of its record {damaged} differs")

    def _spec(self, name: str) -> TensorSpec:
        parts = [rank[name] for rank in self._ranks]
        if len({part.dtype for part in parts}) > 1:
            raise ValueError(f"{self.path}: {name} has another type in every rank")
        try:
            shape = whole_shape([tuple(part.shape) for part in parts], shard_named(name))
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from None
        return TensorSpec(parts[0].dtype, shape)


def is_sat(folder: Path) -> bool:
    """Whether `folder` looks like a SAT checkpoint (its root, or one iteration's folder)."""
    return bool(_rank_files(_iteration(folder)))


def read_sat(folder: Path) -> dict[str, Tensor]:
    """Tensors of a SAT checkpoint under canonical names, on the CPU.

    Those of one rank, and those that ranks share, are memory-mapped; parts of several are joined.

    Raises: ValueError if the folder is not whole, or its ranks do not fit each other.
    """
    ranks = _load(folder)
    return {name: _join(ranks, name, folder) for name in ranks[0]}


def _join(ranks: list[dict[str, Tensor]], name: str, folder: Path) -> Tensor:
    try:
        return join([rank[name] for rank in ranks], shard_named(name))
    except ValueError as error:
        raise ValueError(f"{folder}: {name}: {error}") from None


def _load(folder: Path) -> list[dict[str, Tensor]]:
    """Every rank's tensors under canonical names, memory-mapped."""
    files = _rank_files(_iteration(folder))
    wanted = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(max(1, len(files)))]
    lacking = [name for name in wanted if name not in {file.name for file in files}]
    if lacking:
        raise ValueError(
            f"{folder} holds no {lacking[0]}; name the checkpoint folder, with all its files"
        )
    ranks = [_load_rank(file) for file in files]
    for file, tensors in zip(files, ranks, strict=True):
        odd = sorted(tensors.keys() ^ ranks[0].keys())
        if odd:
            raise ValueError(f"{file} and {files[0].name} differ in having {', '.join(odd)}")
    return ranks


def _load_rank(file: Path) -> dict[str, Tensor]:
    try:
        with torch.serialization.safe_globals(SAFE_TYPES):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"{file} is damaged, or holds more than tensors and random states: {reason}"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("module"), dict):
        raise ValueError(f"{file} has no entry `module`; it is no SAT checkpoint")
    return {canonical_name(name): tensor for name, tensor in content["module"].items()}


def _iteration(folder: Path) -> Path:
    latest = folder / "latest"
    return folder / latest.read_text().strip() if latest.is_file() else folder


def _rank_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("mp_rank_*_model_states.pt"))
