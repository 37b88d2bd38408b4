"""Checkpoints of a tiny model for the tests of this folder; SAT's layout written independently."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megavideo.checkpoint.base import base_path
from megavideo.checkpoint.commit import begin, commit, list_checkpoints, temporary
from megavideo.checkpoint.convert import Conversion, convert
from megavideo.checkpoint.files import TensorEntry, TensorSpec, combined_digest, tensor_entry
from megavideo.checkpoint.formats.interface import MOMENTS, Reader, shard_for
from megavideo.checkpoint.formats.sat import sat_name
from megavideo.checkpoint.formats.sharded import ShardedWriter
from megavideo.checkpoint.manifest import Manifest, Progress, Training
from megavideo.checkpoint.part_file import write_part_file
from megavideo.checkpoint.parts import files_of
from megavideo.checkpoint.tensor_stream import blocks_of
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.model.table import parameter_table
from megavideo.model.trainable import is_trainable
from megavideo.parallel.shard import cut
from tests.sizes import tiny

HIDDEN = 16


def model(words: int = 40, hidden: int = HIDDEN, layers: int = 2) -> ModelConfig:
    """A model that eight ranks can share; 40 words divide by eight, other counts may not."""
    return tiny(hidden=hidden, heads=8, layers=layers, vocab_size=words)


def weights(
    stage: str = "keyframes", words: int = 40, seed: int = 0, layers: int = 2
) -> dict[str, Tensor]:
    """Half-precision noise for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    sizes = model(words, layers=layers)
    table = parameter_table(sizes, RecipeConfig(stage=stage, steps=1))
    return {row.name: torch.randn(row.shape, generator=generator).half() for row in table}


class Held(Reader):
    """A checkpoint in memory."""

    format = "held"
    path = Path("/")

    def __init__(self, tensors: dict[str, Tensor]):
        self.held = tensors
        self.tensors = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in tensors.items()}
        self.files = []

    def read(self, name: str) -> Tensor:
        return self.held[name]

    def blocks(self, name: str) -> Iterator[Tensor]:
        return blocks_of(self.held[name])


def sat_part(name: str, whole: Tensor, rank: int, ranks: int) -> Tensor:
    """What SAT keeps of its tensor `name` on one of its ranks (its mpu/layers.py, in short)."""
    if "query_key_value" in name:  # cut into 3 * ranks pieces; one of Q, one of K, one of V
        return torch.cat(whole.chunk(3 * ranks)[rank::ranks]).clone()
    if "dense_h_to_4h" in name or "word_embeddings" in name:
        return whole.chunk(ranks)[rank].clone()
    if name.endswith(".weight") and (".dense." in name or "dense_4h_to_h" in name):
        return whole.chunk(ranks, dim=1)[rank].clone()
    return whole.clone()


def write_split_sat(folder: Path, tensors: dict[str, Tensor], ranks: int) -> Path:
    """A SAT checkpoint of `tensors` (canonical names) as torch.save writes it."""
    (folder / "100").mkdir(parents=True)
    (folder / "latest").write_text("100")
    for rank in range(ranks):
        names = {name: sat_name(name) for name in tensors}
        module = {names[n]: sat_part(names[n], t, rank, ranks) for n, t in tensors.items()}
        path = folder / "100" / f"mp_rank_{rank:02d}_model_states.pt"
        torch.save({"module": module, "iteration": 100}, path)
    return folder


def write_run(
    folder: Path,
    step: int = 20,
    stage: str = "keyframes",
    tp: int = 1,
    words: int = 40,
    layers: int = 2,
) -> dict[str, Tensor]:
    """A run with one checkpoint more and its frozen base; gives all tensors of it."""
    tensors = weights(stage, words, layers=layers)
    frozen = {n: t for n, t in tensors.items() if not is_trainable(n, stage)}
    trained = {n: t.float() + step for n, t in tensors.items() if n not in frozen}
    moments = {f"{n}{m}": t + len(m) for n, t in trained.items() for m in MOMENTS}
    digest = combined_digest(entries_of(frozen)) if frozen else None
    if digest:
        write_parts(base_path(folder, digest), frozen, tp)
    config = {
        "recipe": {"stage": stage},
        "model": model(words, layers=layers).model_dump(mode="json"),
    }
    training = Training(Progress(step, step, 8 * step), config, "data", digest, {"cur_scale": 2.0})
    write_checkpoint(folder, trained | moments, training, tp)
    return {**frozen, **trained, **moments}


def write_checkpoint(
    run: Path, tensors: dict[str, Tensor], training: Training, tp: int = 1
) -> Path:
    """Commit a checkpoint as a training run does: each file by itself, the manifest last."""
    step = training.progress.step
    begin(run, step)
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    seals = {}
    for file, parts in files_of(specs, tp).items():
        rank = int(file.split(".tp-")[1][:2])
        cuts = {name: cut(tensors[name], shard_for(name), rank, tp) for name in parts}
        seals[file] = write_part_file(temporary(run, step) / file, cuts)
    commit(run, step, Manifest(tp, specs, seals, training=training))
    return list_checkpoints(run)[0]


def write_parts(folder: Path, tensors: dict[str, Tensor], tp: int) -> None:
    """A weights folder of ours, unless it is there."""
    if not folder.exists():
        reader = Held(tensors)
        convert(Conversion(reader, ShardedWriter(tp, None), folder, reader.tensors), verify=False)


def entries_of(tensors: dict[str, Tensor]) -> dict[str, TensorEntry]:
    return {name: tensor_entry(tensor) for name, tensor in tensors.items()}
