"""DeepSpeed, imported with its chatter turned down and its compiler left alone."""

import logging
import os
import warnings

import torch

from megavideo.log import log

# Both are read when DeepSpeed is imported or initialised: it wants a local rank also where nothing
# launched the process, and without the other it warns on stdout that it found no GPU.
os.environ.setdefault("LOCAL_RANK", "0")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

__all__ = ["deepspeed", "hush"]


def hush() -> None:
    """Send DeepSpeed's warnings to our log, drop what is below, and compile nothing at start-up."""
    chatter = logging.getLogger("DeepSpeed")
    chatter.handlers[:] = log.handlers
    chatter.setLevel(logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 replaced: warnings at every step.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    if not torch.cuda.is_available():
        # Its shared-memory all-reduce would be compiled by the first process group on a CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
