"""Checkpoints of a tiny model for the tests of this folder; SAT's layout written independently."""

from pathlib import Path

import torch
from torch import Tensor

from megavideo.checkpoint.base import describe, store_base
from megavideo.checkpoint.commit import new_checkpoint
from megavideo.checkpoint.files import combined_digest, write_tensors
from megavideo.checkpoint.formats.interface import MOMENTS, Reader
from megavideo.checkpoint.formats.sat import sat_name
from megavideo.checkpoint.manifest import Manifest, Progress, write_manifest
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.model.table import parameter_table
from megavideo.model.trainable import is_trainable

HIDDEN = 16


def model(words: int = 40, hidden: int = HIDDEN, layers: int = 2) -> ModelConfig:
    """A model that eight ranks can share; 40 words divide by eight, other counts may not."""
    return ModelConfig(
        hidden=hidden,
        heads=8,
        layers=layers,
        text_slots=4,
        frames=3,
        side=2,
        vocab_size=words,
        image_codes=20,
        pad=23,
        newline=24,
        begin_of_image=39,
        position_rows=16,
        image_position=8,
        frame_position_rows=12,
    )


def weights(stage: str = "keyframes", words: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Half-precision noise for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    table = parameter_table(model(words), RecipeConfig(stage=stage, steps=1))
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


def write_run(folder: Path, step: int = 20, stage: str = "keyframes") -> dict[str, Tensor]:
    """A run with one checkpoint and its frozen base; gives all its tensors."""
    tensors = weights(stage)
    frozen = {n: t for n, t in tensors.items() if not is_trainable(n, stage)}
    trained = {n: t.float() for n, t in tensors.items() if n not in frozen}
    moments = {f"{n}{m}": t + len(m) for n, t in trained.items() for m in MOMENTS}
    digest = combined_digest(describe(frozen)) if frozen else None
    if digest:
        store_base(folder, frozen, digest)
    config = {"recipe": {"stage": stage}, "model": model().model_dump(mode="json")}
    with new_checkpoint(folder, step) as checkpoint:
        files = {
            file: write_tensors(checkpoint / file, held)
            for file, held in (
                ("weights.safetensors", trained),
                ("optimizer.safetensors", moments),
            )
        }
        progress = Progress(step, step, 8 * step)
        scaler = {"cur_scale": 2.0}
        write_manifest(checkpoint, Manifest(progress, config, "data", digest, scaler, files))
    return {**frozen, **trained, **moments}
