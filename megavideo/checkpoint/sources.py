"""Weights to start from: a folder of ours or of another format, recognised by what lies in it."""

from pathlib import Path

from torch import Tensor

from megavideo.checkpoint.base import load_base
from megavideo.checkpoint.commit import checkpoints_of, newest_whole, verify_checkpoint
from megavideo.checkpoint.files import read_tensors
from megavideo.checkpoint.formats.huggingface import INDEX, HuggingFaceReader
from megavideo.checkpoint.formats.interface import is_moment
from megavideo.checkpoint.formats.sat import read_sat
from megavideo.checkpoint.formats.sharded import WEIGHTS_MANIFEST, ShardedReader
from megavideo.checkpoint.manifest import MANIFEST, read_manifest
from megavideo.log import log
from megavideo.model.trainable import is_trainable

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"


def find_checkpoint(path: Path) -> Path | None:
    """The whole checkpoint at `path`: itself, or the newest of a run's folder. None if neither.

    Raises:
        ValueError: if it is damaged.
    """
    if (path / MANIFEST).is_file():
        verify_checkpoint(path)
        return path
    return newest_whole(path) if checkpoints_of(path).is_dir() else None


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder belongs to."""
    return checkpoint.resolve().parent.parent


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What training changed, in float32, by canonical name."""
    return read_tensors(checkpoint / WEIGHTS, read_manifest(checkpoint).files[WEIGHTS])


def read_frozen(checkpoint: Path) -> dict[str, Tensor]:
    """The frozen weights that a checkpoint refers to; empty if everything was trained."""
    base = read_manifest(checkpoint).base
    return {} if base is None else load_base(run_of(checkpoint), base)


def read_base(path: Path) -> dict[str, Tensor]:
    """Text-to-image weights by canonical name, from `recipe.base`.

    A run of stage image gives what it trained, a run of a later stage the base that it was given.
    Of bare weights (ours, Hugging Face's layout, SAT) a temporal channel is left aside.

    Raises:
        FileNotFoundError, ValueError: if `path` is none of them, or damaged.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"recipe.base={path} is no folder")
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        return _without_temporal(path, _bare_weights(path))
    if read_manifest(checkpoint).stage == "image":
        return read_weights(checkpoint)
    return read_frozen(checkpoint)


def read_start(path: Path) -> dict[str, Tensor]:
    """The temporal channel of the checkpoint or run at `path`, from `recipe.start_from`.

    Raises:
        FileNotFoundError, ValueError: if it is no checkpoint of ours with a temporal channel.
    """
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(f"recipe.start_from={path} holds no checkpoint")
    if read_manifest(checkpoint).stage == "image":
        raise ValueError(
            f"recipe.start_from={path} is a text-to-image run without a temporal channel; "
            "name it as recipe.base"
        )
    return read_weights(checkpoint)


def _bare_weights(path: Path) -> dict[str, Tensor]:
    for mark, reader_of in ((WEIGHTS_MANIFEST, ShardedReader), (INDEX, HuggingFaceReader)):
        if (path / mark).is_file():
            reader = reader_of(path)
            return {name: reader.read(name) for name in reader.tensors if not is_moment(name)}
    return read_sat(path)


def _without_temporal(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    base = {name: t for name, t in tensors.items() if not is_trainable(name, "keyframes")}
    if len(base) < len(tensors):
        log.info("leaving aside the temporal channel of %s", path)
    return base
