"""SAT checkpoints, the format of CogView2 and CogVideo: `latest`, `<n>/mp_rank_00_*.pt`.

Nothing is unpickled but tensors and the few types that SAT's random states hold.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct
from numpy.dtypes import UInt32DType
from torch import Tensor

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


def is_sat(folder: Path) -> bool:
    """Whether `folder` looks like a SAT checkpoint (its root, or one iteration's folder)."""
    return bool(_rank_files(_iteration(folder)))


def read_sat(folder: Path) -> dict[str, Tensor]:
    """Tensors of a SAT checkpoint under canonical names, on the CPU and memory-mapped.

    Raises: ValueError if the folder is not whole, or split over model-parallel ranks.
    """
    files = _rank_files(_iteration(folder))
    if not files:
        raise ValueError(
            f"{folder} holds no mp_rank_00_model_states.pt; name the checkpoint folder"
        )
    if len(files) > 1:
        raise ValueError(
            f"{folder} is split over {len(files)} model-parallel ranks ({files[-1].name}); "
            "only a checkpoint of one rank can be read, merge it first"
        )
    with torch.serialization.safe_globals(SAFE_TYPES):
        content = torch.load(files[0], map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or "module" not in content:
        raise ValueError(f"{files[0]} has no entry `module`; it is no SAT checkpoint")
    return {canonical_name(name): tensor for name, tensor in content["module"].items()}


def _iteration(folder: Path) -> Path:
    latest = folder / "latest"
    return folder / latest.read_text().strip() if latest.is_file() else folder


def _rank_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("mp_rank_*_model_states.pt"))
