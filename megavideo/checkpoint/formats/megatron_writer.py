"""Megatron-LM checkpoints written: a file a rank, a stage's ranks in one pass (see megatron.py)."""

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.formats.interface import (
    MOMENTS,
    Group,
    OpenGroup,
    Writer,
    assembled,
    by_layer,
    is_moment,
    shard_for,
)
from megavideo.checkpoint.formats.megatron import (
    FILE,
    HEAD_COPY,
    OURS,
    RELEASE,
    ROWS,
    TRACKER,
    is_qkv,
    is_vocabulary,
    megatron_name,
)
from megavideo.checkpoint.formats.pt_stream import STORAGES, PtSink, StandIn
from megavideo.checkpoint.manifest import Training, training_text
from megavideo.checkpoint.tensor_stream import TensorSpec, blocks_of, scatter, steps
from megavideo.files import atomic_write
from megavideo.parallel.shard import part_shape

CHECKPOINT_VERSION = 3.0
DIVISIBLE_BY = 128  # Megatron's make_vocab_size_divisible_by: each rank's rows are a multiple of it


class MegatronWriter(Writer):
    """Writes weights, and a run's moments and progress, for `tp` x `pp` ranks of `heads` heads."""

    format = "megatron"

    def __init__(self, tp: int, pp: int, heads: int, training: Training | None):
        if heads % tp:
            raise ValueError(f"--tp {tp} does not divide the model's {heads} heads")
        self.tp = tp
        self.pp = pp
        self.heads = heads
        self.training = training
        step = training.progress.step if training else 0
        self._iteration = str(step) if step else RELEASE  # Megatron takes no iteration 0
        self._folder = f"iter_{step:07d}" if step else RELEASE

    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        for name, spec in tensors.items():
            if spec.dtype not in STORAGES:
                raise ValueError(f"{name} has type {spec.dtype}; choose one with --dtype")
            self._part(name, spec)
        groups = []
        for stage, layers in enumerate(self._stages(tensors)):
            names = [name for layer in layers for name in by_layer(tensors)[layer]]
            if 0 < stage == self.pp - 1:
                names.append("embedding.word")
            files = tuple(f"{self._folder}/{self._rank(tp, stage)}/{FILE}" for tp in range(self.tp))
            groups.append(Group(files, tuple(names)))
        return groups

    def open(self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]) -> OpenGroup:
        stages = self._stages(tensors)
        stage = next(s for s in range(self.pp) if self._rank(0, s) == _rank_folder(group))
        layers = [layer for layer in stages[stage] if layer.startswith("layers.")]
        first = int(layers[0].split(".")[1])
        parts = {name: StandIn(name, self._part(name, tensors[name])) for name in group.tensors}
        is_last = 0 < stage == self.pp - 1
        head_copy = parts.pop("embedding.word") if is_last else None
        content = {
            "args": self._arguments(tensors),
            "checkpoint_version": CHECKPOINT_VERSION,
            "iteration": int(self._iteration) if self._iteration != RELEASE else 0,
            "model": _model(parts, first, head_copy),
            **self._optimizer(parts, first),
            OURS: {
                "heads": self.heads,
                "vocabulary": tensors["embedding.word"].shape[0],
                "training": training_text(self.training),
            },
        }
        return _Files([PtSink(folder / file, content) for file in group.files], self)

    def resident(self, name: str, spec: TensorSpec) -> int:
        return spec.nbytes if is_qkv(name) else 0

    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        with atomic_write(folder / TRACKER) as file:
            file.write(self._iteration.encode())

    def padded_rows(self, rows: int) -> int:
        """Rows of the word table with its padding."""
        multiple = DIVISIBLE_BY * self.tp
        return -(-rows // multiple) * multiple

    def _stages(self, tensors: Mapping[str, TensorSpec]) -> list[list[str]]:
        """Layers of each pipeline stage: as many blocks in each, as Megatron wants it.

        Raises: ValueError if they do not divide.
        """
        layers = list(by_layer(tensors))
        count = len(layers) - 2
        if count % self.pp:
            raise ValueError(f"--pp {self.pp} does not divide the model's {count} layers")
        share = count // self.pp
        stages = [layers[1 + stage * share : 1 + (stage + 1) * share] for stage in range(self.pp)]
        stages[0].insert(0, layers[0])
        stages[-1].append(layers[-1])
        return stages

    def _rank(self, tp: int, pp: int) -> str:
        return f"mp_rank_{tp:02d}" if self.pp == 1 else f"mp_rank_{tp:02d}_{pp:03d}"

    def _part(self, name: str, spec: TensorSpec) -> TensorSpec:
        """What every rank holds of a tensor."""
        shape, shard = spec.shape, shard_for(name)
        if is_vocabulary(name):
            shape, shard = (self.padded_rows(shape[0]), *shape[1:]), ROWS
        try:
            return TensorSpec(spec.dtype, part_shape(shape, shard, 0, self.tp))
        except ValueError as error:
            raise ValueError(f"{name} does not fit --tp {self.tp}: {error}") from None

    def _arguments(self, tensors: Mapping[str, TensorSpec]) -> Namespace:
        """What Megatron compares with its own arguments before it loads."""
        words, hidden = tensors["embedding.word"].shape
        return Namespace(
            num_layers=len(by_layer(tensors)) - 2,
            hidden_size=hidden,
            num_attention_heads=self.heads,
            ffn_hidden_size=tensors["layers.0.mlp.up.weight"].shape[0],
            max_position_embeddings=tensors["embedding.position"].shape[0],
            vocab_size=words,
            padded_vocab_size=self.padded_rows(words),
            make_vocab_size_divisible_by=DIVISIBLE_BY,
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            consumed_train_samples=self.training.progress.consumed_samples if self.training else 0,
            consumed_valid_samples=0,
        )

    def _optimizer(self, parts: Mapping[str, StandIn], first_layer: int) -> dict[str, Any]:
        """The torch optimizer's state dictionary, in which parameters are named."""
        names = [n for n in parts if not is_moment(n) and n + MOMENTS[0] in parts]
        if self.training is None or not any(map(is_moment, parts)):
            return {}
        step = self.training.progress.updates
        state = {
            index: {"step": step, **{moment[1:]: parts[name + moment] for moment in MOMENTS}}
            for index, name in enumerate(names)
        }
        local = [megatron_name(_local(name, first_layer)) for name in names]
        group = {"params": list(range(len(names))), "param_names": local}
        return {"optimizer": {"optimizer": {"state": state, "param_groups": [group]}}}


class _Files(OpenGroup):
    """One stage's files: QKV goes in head by head, the word table with its padding."""

    def __init__(self, sinks: list[PtSink], writer: MegatronWriter):
        super().__init__(sinks)
        self._writer = writer

    def write(self, name: str, spec: TensorSpec, blocks: Iterable[Tensor]) -> None:
        appends = [partial(sink.append, name) for sink in self.sinks]
        shard = shard_for(name)
        if is_vocabulary(name):
            shard = ROWS
            rows = self._writer.padded_rows(spec.shape[0])
            padding = TensorSpec(spec.dtype, (rows - spec.shape[0], *spec.shape[1:]))
            spec = TensorSpec(spec.dtype, (rows, *spec.shape[1:]))
            blocks = chain(blocks, _zeros(padding))
        elif is_qkv(name):
            shard = ROWS
            blocks = by_head(assembled(spec, blocks), self._writer.heads)
        scatter(blocks, shard, spec, appends)


def by_head(whole: Tensor, heads: int) -> Iterator[Tensor]:
    """The rows [3, heads, head size] of a QKV, as blocks in the order [heads, 3, head size]."""
    projections = whole.view(3, heads, -1, *whole.shape[1:])
    for head in range(heads):
        yield from blocks_of(projections[:, head].flatten(0, 1))


def _zeros(spec: TensorSpec) -> Iterator[Tensor]:
    for count in steps(spec.shape[0], spec.row_bytes):
        yield torch.zeros(count, *spec.shape[1:], dtype=spec.dtype)


def _model(
    parts: Mapping[str, StandIn], first_layer: int, head_copy: StandIn | None
) -> dict[str, Any]:
    """Nested as Megatron's `state_dict_for_save_checkpoint` nests it."""
    embedding: dict[str, Any] = {}
    encoder: dict[str, Any] = {}
    for name, part in parts.items():
        if is_moment(name):
            continue
        _, section, rest = megatron_name(_local(name, first_layer)).split(".", 2)
        if section == "embedding":
            embedding[rest.removesuffix(".weight")] = {"weight": part}
        else:
            encoder[rest] = part
    model: dict[str, Any] = {"language_model": {"encoder": encoder}}
    if embedding:
        model["language_model"]["embedding"] = embedding
    if head_copy is not None:
        module, weight = HEAD_COPY.split(".")
        model[module] = {weight: head_copy}
    return model


def _local(name: str, first_layer: int) -> str:
    """A parameter's name with its layer's number in a stage that begins with `first_layer`."""
    kind, *rest = name.split(".")
    if kind != "layers":
        return name
    return ".".join((kind, str(int(rest[0]) - first_layer), *rest[1:]))


def _rank_folder(group: Group) -> str:
    return Path(group.files[0]).parent.name
