"""Weights to start from: a folder of ours or of another format, recognised by what lies in it."""

from dataclasses import dataclass
from pathlib import Path

from megavideo.checkpoint.commit import checkpoints_of, newest_whole, verify_checkpoint
from megavideo.checkpoint.formats.huggingface import INDEX, HuggingFaceReader
from megavideo.checkpoint.formats.interface import Reader, Selection, Source, is_moment
from megavideo.checkpoint.formats.megatron import MegatronReader, is_megatron
from megavideo.checkpoint.formats.run import RunReader
from megavideo.checkpoint.formats.sat import SatReader
from megavideo.checkpoint.formats.sharded import WEIGHTS_MANIFEST, ShardedReader
from megavideo.checkpoint.formats.universal import UniversalReader, is_universal
from megavideo.checkpoint.manifest import MANIFEST
from megavideo.config.schema import RecipeConfig
from megavideo.log import log
from megavideo.model.trainable import is_trainable


def find_checkpoint(path: Path) -> Path | None:
    """The whole checkpoint at `path`: itself, or the newest of a run's folder. None if neither.

    Raises:
        ValueError: if it is damaged.
    """
    if (path / MANIFEST).is_file():
        verify_checkpoint(path)
        return path
    return newest_whole(path) if checkpoints_of(path).is_dir() else None


@dataclass(frozen=True)
class Start:
    """Which checkpoints `recipe.base` and `recipe.start_from` mean; None: bare weights, or unset.

    Found once for all ranks: each would read everything to find the newest whole one, and of a run
    that goes on meanwhile each might find another.
    """

    base: Path | None = None
    channel: Path | None = None


def find_start(recipe: RecipeConfig) -> Start:
    """The whole checkpoints to start from, read and checked.

    Raises:
        FileNotFoundError, ValueError: if a folder is not there, is no checkpoint, or damaged.
    """
    return Start(
        None if recipe.base is None else _find_base(Path(recipe.base)),
        None if recipe.start_from is None else _find_channel(Path(recipe.start_from)),
    )


def open_base_weights(path: Path) -> Source:
    """`base_weights` of what is whole at `path`.

    Raises:
        FileNotFoundError, ValueError: if it is no folder of weights, or damaged.
    """
    return base_weights(path, _find_base(path))


def base_weights(path: Path, checkpoint: Path | None) -> Source:
    """Text-to-image weights by canonical name, from `recipe.base`.

    A run of stage image gives what it trained, a run of a later stage the base that it was given.
    Of other formats, as of bare weights of ours, a temporal channel is left aside.

    Args:
        checkpoint: the one at `path`; None if bare weights lie there.

    Raises:
        FileNotFoundError, ValueError: if it is none of them, or damaged.
    """
    reader = _bare_weights(path) if checkpoint is None else RunReader(checkpoint)
    weights = [name for name in reader.tensors if not is_moment(name)]
    base = [name for name in weights if not is_trainable(name, "keyframes")]
    if checkpoint is None and len(base) < len(weights):
        log.info("leaving aside the temporal channel of %s", path)
    return Selection(reader, base)


def channel_weights(checkpoint: Path) -> Source:
    """The temporal channel of a checkpoint of ours, from `recipe.start_from`.

    Raises:
        FileNotFoundError, ValueError: if it has none, or is damaged.
    """
    reader = RunReader(checkpoint)
    if reader.training.stage == "image":
        raise ValueError(
            f"recipe.start_from: {checkpoint} is a text-to-image run's, without a temporal "
            "channel; name the run as recipe.base"
        )
    return Selection(reader, (n for n in reader.trained.tensors if not is_moment(n)))


def _find_base(path: Path) -> Path | None:
    if not path.is_dir():
        raise FileNotFoundError(f"recipe.base={path} is no folder")
    return find_checkpoint(path)


def _find_channel(path: Path) -> Path:
    checkpoint = find_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(f"recipe.start_from={path} holds no checkpoint")
    return checkpoint


def _bare_weights(path: Path) -> Reader:
    for mark, reader_of in ((WEIGHTS_MANIFEST, ShardedReader), (INDEX, HuggingFaceReader)):
        if (path / mark).is_file():
            return reader_of(path)
    if is_universal(path):
        return UniversalReader(path)
    return MegatronReader(path) if is_megatron(path) else SatReader(path)
