"""Megatron-LM checkpoints: `iter_0000010/mp_rank_00_000/model_optim_rng.pt`, a file a rank.

    latest_checkpointed_iteration.txt     the iteration, or `release` for bare weights
    iter_0000010/mp_rank_TT               of tensor-parallel rank TT, with one pipeline stage
    iter_0000010/mp_rank_TT_PPP           the same of pipeline stage PPP

Layers are numbered from 0 in every stage. The word table is filled up with rows of zeros until the
ranks share it evenly. Rows of a fused QKV are ordered by `checkpoint_version`, within each rank:

    3.0, 2.0   [heads, 3, head size]     what is written
    1.0        [heads, head size, 3]
    0          [3, heads, head size]

(Megatron-LM, megatron/checkpointing.py: `fix_query_key_value_ordering`, `get_checkpoint_name`.)
Parameters that Megatron has not have names in its style; `NAMES` and docs/convert.md list them.
"""

import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavideo.checkpoint.formats.interface import (
    MOMENTS,
    Reader,
    parameter_of,
    shard_for,
)
from megavideo.checkpoint.formats.names import to_ours, to_theirs
from megavideo.checkpoint.formats.pt_stream import (
    PtFile,
    check_same_names,
    named_errors,
    whole_spec,
)
from megavideo.checkpoint.formats.sat import SAFE_TYPES
from megavideo.checkpoint.manifest import training_from_text
from megavideo.checkpoint.tensor_stream import (
    Rows,
    Stored,
    TensorSpec,
    blocks_of,
    joined,
    same_bits,
)
from megavideo.log import log
from megavideo.parallel.shard import Shard

TRACKER = "latest_checkpointed_iteration.txt"
FILE = "model_optim_rng.pt"
OURS = "megavideo"  # our entry in their files: what theirs has no place for
RELEASE = "release"
ROWS = Shard(dim=0)  # equal runs of rows, as Megatron cuts what it has padded or reordered

NAMES = {
    "language_model.embedding.word_embeddings.weight": "embedding.word",
    "language_model.embedding.position_embeddings.weight": "embedding.position",
    "language_model.embedding.frame_position_embeddings.weight": "embedding.frame_position",
    "language_model.encoder.layers.{i}.input_layernorm": "layers.{i}.input_norm",
    "language_model.encoder.layers.{i}.self_attention.query_key_value": (
        "layers.{i}.attention.spatial.qkv"
    ),
    "language_model.encoder.layers.{i}.self_attention.dense": "layers.{i}.attention.spatial.dense",
    "language_model.encoder.layers.{i}.temporal_attention.query_key_value": (
        "layers.{i}.attention.temporal.qkv"
    ),
    "language_model.encoder.layers.{i}.temporal_attention.dense": (
        "layers.{i}.attention.temporal.dense"
    ),
    "language_model.encoder.layers.{i}.attention_mixture": "layers.{i}.attention.mixture",
    "language_model.encoder.layers.{i}.third_layernorm": "layers.{i}.attention_norm",
    "language_model.encoder.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "language_model.encoder.layers.{i}.mlp.dense_h_to_4h": "layers.{i}.mlp.up",
    "language_model.encoder.layers.{i}.mlp.dense_4h_to_h": "layers.{i}.mlp.down",
    "language_model.encoder.layers.{i}.fourth_layernorm": "layers.{i}.mlp_output_norm",
    "language_model.encoder.final_layernorm": "head.norm",
}
# The last stage's copy of the word table, for the logits.
HEAD_COPY = "word_embeddings_for_head.weight"
# Before checkpoint version 2: other names of the same.
OLD_NAMES = {".transformer.": ".encoder.", ".attention.": ".self_attention."}


def megatron_name(canonical: str) -> str:
    """Megatron's name of our parameter, with the layer's number in it."""
    theirs = to_theirs(NAMES, canonical)
    assert theirs is not None, f"the table lacks {canonical}"
    return theirs


def canonical_name(theirs: str, first_layer: int) -> str:
    """Our name of their parameter in a stage that begins with layer `first_layer`.

    Raises: ValueError if no model of ours has such a parameter.
    """
    for old, new in OLD_NAMES.items():
        theirs = theirs.replace(old, new)
    ours = to_ours(NAMES, theirs)
    if ours is None:
        raise ValueError(f"{theirs} is no tensor of a MegaVideo model in Megatron's format")
    return re.sub(r"^layers\.(\d+)", lambda found: f"layers.{int(found[1]) + first_layer}", ours)


def is_vocabulary(name: str) -> bool:
    """Whether the weight or moment `name` is filled up with rows."""
    return parameter_of(name) == "embedding.word"


def is_qkv(name: str) -> bool:
    """Whether rows of the weight or moment `name` are reordered."""
    return ".qkv." in name


@dataclass(frozen=True)
class _Rank:
    """What one file holds: names, of parameters and moments, as in the whole model."""

    tensors: dict[str, Tensor]
    head_copy: Tensor | None


class MegatronReader(Reader):
    """Reads files of any TP x PP, checking each tensor's checksum in the zip archive.

    Args:
        vocab_size: rows of the word table that are not padding, where the files do not say it.
    """

    format = "megatron"

    def __init__(self, path: Path, vocab_size: int | None = None):
        """Raises: ValueError if it is not whole, or its ranks do not fit each other."""
        self.path = path
        grid = _rank_files(_iteration(path))
        self._files = {file: PtFile(file, [*SAFE_TYPES, Namespace]) for row in grid for file in row}
        self._content: dict[str, Any] = _content(self._files[grid[0][0]])
        record = self._content.get(OURS) or {}
        self.training = training_from_text(record.get("training"))
        self._version = float(self._content.get("checkpoint_version", 0))
        self._parts: dict[str, list[Stored]] = {}
        self._copy: list[Stored] = []
        first_layer = 0
        for stage in grid:
            first_layer += self._add_stage(stage, first_layer)
        self.tensors = {name: self._spec(name) for name in self._parts}
        self._cut_padding(vocab_size or record.get("vocabulary") or self._argument("vocab_size"))
        self.files = [file.relative_to(path) for file in self._files]
        if (path / TRACKER).is_file():
            self.files.append(Path(TRACKER))

    @property
    def heads(self) -> int | None:
        record = self._content.get(OURS) or {}
        return record.get("heads") or self._argument("num_attention_heads")

    def blocks(self, name: str) -> Iterator[Tensor]:
        return named_errors(self._blocks(name), f"{self.path}: {name}")

    def resident(self, name: str) -> int:
        return self.tensors[name].nbytes if self._reorders(name) else 0

    def verify_files(self) -> None:
        for file in self._files.values():
            file.verify_rest()

    def _blocks(self, name: str) -> Iterator[Tensor]:
        parts, spec = self._parts[name], self.tensors[name]
        if self._reorders(name):
            assert self.heads is not None, "checked when it was opened"
            return blocks_of(by_projection(parts, spec, self.heads, self._version >= 2))
        if is_vocabulary(name):
            padded = _padded(parts)
            blocks = joined(parts, ROWS, padded)
            if name == "embedding.word" and self._copy:
                blocks = _same(blocks, joined(self._copy, ROWS, padded), self._copy[0].path)
            return _first_rows(blocks, spec.shape[0])
        return joined(parts, shard_for(name), spec)

    def _reorders(self, name: str) -> bool:
        return is_qkv(name) and self._version >= 1

    def _add_stage(self, files: list[Path], first_layer: int) -> int:
        """Take in one stage's files, by tensor-parallel rank; the number of its layers."""
        ranks = [_rank(self._files[file], first_layer) for file in files]
        check_same_names(files, [rank.tensors for rank in ranks])
        for name in ranks[0].tensors:
            if name in self._parts:
                raise ValueError(f"{self.path}: two stages hold {name}")
            pairs = zip(files, ranks, strict=True)
            self._parts[name] = [self._files[f].stored(rank.tensors[name]) for f, rank in pairs]
        for file, rank in zip(files, ranks, strict=True):
            if rank.head_copy is not None:
                self._copy.append(self._files[file].stored(rank.head_copy))
        return len({n.split(".")[1] for n in ranks[0].tensors if n.startswith("layers.")})

    def _spec(self, name: str) -> TensorSpec:
        if is_vocabulary(name):
            return _padded(self._parts[name])
        if self._reorders(name) and (self.heads is None or self.heads % len(self._parts[name])):
            raise ValueError(f"{self.path} has args.num_attention_heads={self.heads}")
        return whole_spec(self.path, name, self._parts[name])

    def _cut_padding(self, rows: int | None) -> None:
        for name in filter(is_vocabulary, self.tensors):
            dtype, (padded, *rest) = self.tensors[name].dtype, self.tensors[name].shape
            if rows is None or rows > padded:
                raise ValueError(
                    f"{self.path} does not say how many of its word table's {padded} rows are no "
                    "padding; give --vocab-size"
                )
            self.tensors[name] = TensorSpec(dtype, (rows, *rest))

    def _argument(self, name: str) -> int | None:
        return getattr(self._content.get("args"), name, None)


def is_megatron(folder: Path) -> bool:
    """Whether `folder` looks like a Megatron checkpoint (its root, or one iteration's folder)."""
    return bool(list(_iteration(folder).glob(f"mp_rank_*/{FILE}")))


def by_projection(parts: list[Stored], spec: TensorSpec, heads: int, by_head: bool) -> Tensor:
    """The whole QKV [3 x heads x head size, ...] of ranks' parts that are ordered by head first.

    Args:
        by_head: whether within a head come the rows of Q, then K, then V; else row by row.
    """
    whole = torch.empty(spec.shape, dtype=spec.dtype)
    size = spec.shape[0] // (3 * heads)
    target = whole.view(3, heads, size, *spec.shape[1:])
    share = heads // len(parts)
    for rank, part in enumerate(parts):
        rows = Rows(part)
        for head in range(rank * share, (rank + 1) * share):
            block = rows.take(3 * size)
            shape = (3, size) if by_head else (size, 3)
            ordered = block.view(*shape, *spec.shape[1:])
            target[:, head] = ordered if by_head else ordered.transpose(0, 1)
    return whole


def _rank_files(folder: Path) -> list[list[Path]]:
    """Files by pipeline stage and tensor-parallel rank.

    Raises: ValueError if one is missing.
    """
    found: dict[tuple[int, int], Path] = {}
    for file in folder.glob(f"mp_rank_*/{FILE}"):
        numbers = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", file.parent.name)
        if numbers:
            found[int(numbers[2] or 0), int(numbers[1])] = file
    stages, ranks = (max((place[axis] for place in found), default=0) + 1 for axis in (0, 1))
    for stage in range(stages):
        for rank in range(ranks):
            if (stage, rank) not in found:
                raise ValueError(f"{folder} lacks rank {rank} of pipeline stage {stage}")
    return [[found[stage, rank] for rank in range(ranks)] for stage in range(stages)]


def _rank(file: PtFile, first_layer: int) -> _Rank:
    content = _content(file)
    flat = dict(_flat(content["model"]))
    head_copy = flat.pop(HEAD_COPY, None)
    tensors = {canonical_name(name, first_layer): tensor for name, tensor in flat.items()}
    for name, state in _optimizer_states(file.path, content):
        for moment in MOMENTS:
            tensors[canonical_name(name, first_layer) + moment] = state[moment[1:]]
    return _Rank(tensors, head_copy)


def _content(file: PtFile) -> dict[str, Any]:
    if not isinstance(file.content, dict) or not isinstance(file.content.get("model"), dict):
        raise ValueError(
            f"{file.path} has no entry `model`: it is no Megatron checkpoint, or one of several "
            "model chunks a rank (virtual stages), which are not read"
        )
    return file.content


def _flat(model: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of nested dictionaries. Others, as extra states, are left out."""
    for name, item in model.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{name}.")
        elif isinstance(item, Tensor):
            yield f"{prefix}{name}", item


def _optimizer_states(path: Path, content: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Names of parameters, as in the file, and their states; none if the file has no names."""
    optimizer = (content.get("optimizer") or {}).get("optimizer")
    if not optimizer:
        return []
    if not all("param_names" in group for group in optimizer["param_groups"]):
        log.warning("leaving out the optimizer state of %s: it does not name parameters", path)
        return []
    return [
        (name, optimizer["state"][index])
        for group in optimizer["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
    ]


def _padded(parts: list[Stored]) -> TensorSpec:
    rows = sum(part.spec.shape[0] for part in parts)
    return TensorSpec(parts[0].spec.dtype, (rows, *parts[0].spec.shape[1:]))


def _first_rows(blocks: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    """Blocks up to `rows`; the rest is read too, for its checksum."""
    for block in blocks:
        if rows > 0:
            yield block[:rows]
        rows -= len(block)


def _same(blocks: Iterable[Tensor], copy: Iterable[Tensor], path: Path) -> Iterator[Tensor]:
    for block, other in zip(blocks, copy, strict=True):
        if not same_bits(block, other):
            raise ValueError(f"{path} holds another word table for the head")
        yield block


def _iteration(folder: Path) -> Path:
    if not (folder / TRACKER).is_file():
        return folder
    iteration = (folder / TRACKER).read_text().strip()
    return folder / (iteration if iteration == RELEASE else f"iter_{int(iteration):07d}")
