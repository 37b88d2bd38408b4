"""Which format a folder is in, told by what lies in it."""

from pathlib import Path

from megavideo.checkpoint.formats.huggingface import INDEX, HuggingFaceReader
from megavideo.checkpoint.formats.interface import Reader
from megavideo.checkpoint.formats.run import RunReader
from megavideo.checkpoint.formats.sat import SatReader, is_sat
from megavideo.checkpoint.formats.sharded import WEIGHTS_MANIFEST, ShardedReader
from megavideo.checkpoint.sources import find_checkpoint


def open_checkpoint(path: Path) -> Reader:
    """A reader of the checkpoint at `path`, whatever its format.

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
    if is_sat(path):
        return SatReader(path)
    raise ValueError(
        f"{path} holds no whole checkpoint: neither {WEIGHTS_MANIFEST} (ours), {INDEX} "
        "(Hugging Face), a run with checkpoints, nor mp_rank_00_model_states.pt (SAT)"
    )
