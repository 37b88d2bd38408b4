"""Which format a folder is in, told by what lies in it."""

from pathlib import Path

from megavideo.checkpoint.formats.huggingface import INDEX, HuggingFaceReader
from megavideo.checkpoint.formats.interface import Reader
from megavideo.checkpoint.formats.megatron import MegatronReader, is_megatron
from megavideo.checkpoint.formats.run import RunReader
from megavideo.checkpoint.formats.sat import SatReader, is_sat
from megavideo.checkpoint.formats.sharded import WEIGHTS_MANIFEST, ShardedReader
from megavideo.checkpoint.formats.universal import UniversalReader, is_universal
from megavideo.checkpoint.sources import find_checkpoint


def open_checkpoint(path: Path, vocab_size: int | None = None) -> Reader:
    """A reader of the checkpoint at `path`, whatever its format.

    Args:
        vocab_size: rows of the word table without padding, for Megatron's files that lack it.

    Raises:
        ValueError: if it is damaged, or of no known format.
        FileNotFoundError: if a part of it is missing.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is no folder")
    if (path / WEIGHTS_MANIFEST).is_file():
        return ShardedReader(path)
    if (path / INDEX).is_file():
        return HuggingFaceReader(path)
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        return RunReader(checkpoint)
    if is_universal(path):  # before SAT's, whose files have a name that is there too
        return UniversalReader(path)
    if is_megatron(path):
        return MegatronReader(path, vocab_size)
    if is_sat(path):
        return SatReader(path)
    raise ValueError(
        f"{path} holds no whole checkpoint: neither {WEIGHTS_MANIFEST} (ours), {INDEX} "
        "(Hugging Face), a run with checkpoints, zero/ (DeepSpeed universal), mp_rank_00/"
        "model_optim_rng.pt (Megatron-LM), nor mp_rank_00_model_states.pt (SAT)"
    )
