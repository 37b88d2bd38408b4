"""DeepSpeed, imported with its chatter turned down and its compiler left alone."""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

import torch

from megavideo.log import log

# Both are read when DeepSpeed is imported or initialised: it wants a local rank also where nothing
# launched the process, and without the other it warns on stdout that it found no GPU.
os.environ.setdefault("LOCAL_RANK", "0")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

__all__ = ["deepspeed", "hushed", "prebuilt_ops"]


@contextmanager
def hushed() -> Iterator[None]:
    """Initialise DeepSpeed here: what it prints goes to our debug log, and nothing is compiled."""
    _hush()
    printed = io.StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        log.debug("DeepSpeed printed: %s", printed.getvalue())


def _hush() -> None:
    """Send DeepSpeed's warnings to our log and drop what is below."""
    chatter = logging.getLogger("DeepSpeed")
    chatter.handlers[:] = log.handlers
    chatter.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 replaced: warnings at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    if not torch.cuda.is_available():
        # Its shared-memory all-reduce would be compiled by the first process group on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def prebuilt_ops() -> tuple[str, ...]:
    """DeepSpeed's compiled operators that were built when it was installed."""
    from deepspeed.git_version_info import installed_ops

    return tuple(sorted(name for name, built in installed_ops.items() if built))
