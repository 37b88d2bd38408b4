"""Which program computes local attention: what each backend can do, and which is preferred where.

    library    the fused CUDA kernels (kernels/local_attention/)
    flex       torch's FlexAttention
    sdpa       torch's scaled_dot_product_attention, block by block
    reference  plain torch; the meaning of all the others

The environment variable MEGAVIDEO_ATTENTION names one for a whole run, to compare or to work
around. MEGAVIDEO_ATTENTION_BACKWARD=atomic lets the kernels go backward in one pass that adds up
the gradients of queries in whatever order; `deterministic`, the default, is two passes whose bits
are the same in each run (kernels/local_attention/README.md has the arithmetic of both).
"""

import os
from collections.abc import Callable
from functools import lru_cache

import torch

from megavideo.log import log
from megavideo.ops import library
from megavideo.ops.c_call import ELEMENTS, HEAD_SIZES
from megavideo.ops.selfcheck import disagreement

# Best first. On a GPU the kernels' lead is an expectation until kernels/local_attention/README.md
# has measurements; on a CPU SDPA was measured to beat the reference.
PREFERRED = {"cuda": ("library", "flex", "reference"), "cpu": ("sdpa", "reference")}


@lru_cache(maxsize=64)
def choose(device: str, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    """The backend for this type of device, elements, D and dropout; says so in the log, once.

    Raises:
        ValueError: if MEGAVIDEO_ATTENTION names a backend that cannot do it.
    """
    forced = os.environ.get("MEGAVIDEO_ATTENTION")
    passed_over: list[str] = []
    if forced:
        backend = _forced(forced, device, dtype, head_size, dropout)
    else:
        backend, passed_over = _preferred(device, dtype, head_size, dropout)
    noise = "with" if dropout else "without"
    case = f"attention on {device}, {dtype}, head size {head_size}, {noise} dropout"
    others = "".join(f"; not {reason}" for reason in passed_over)
    log.info("%s: %s%s%s", case, backend, _said_of_backward(backend), others)
    return backend


def atomic_backward() -> bool:
    """Whether the kernels are to go backward in one pass with atomic additions.

    Raises:
        ValueError: if MEGAVIDEO_ATTENTION_BACKWARD is unknown, or asks for what
            torch.use_deterministic_algorithms forbids. Both were asked for in so many words, so
            neither is given up for the other.
    """
    way = os.environ.get("MEGAVIDEO_ATTENTION_BACKWARD") or "deterministic"
    if way not in ("deterministic", "atomic"):
        raise ValueError(
            f"MEGAVIDEO_ATTENTION_BACKWARD={way} is neither deterministic (the default) nor atomic"
        )
    if way == "atomic" and _must_be_deterministic():
        raise ValueError(
            "MEGAVIDEO_ATTENTION_BACKWARD=atomic gives gradients whose last bits vary, and "
            "torch.use_deterministic_algorithms(True) forbids that; unset one of the two"
        )
    return way == "atomic"


def _must_be_deterministic() -> bool:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not warn_only


def _said_of_backward(backend: str) -> str:
    if not atomic_backward():
        return ""
    if backend == "library":
        return ", atomic backward (last bits of gradients vary from run to run)"
    return ", on which MEGAVIDEO_ATTENTION_BACKWARD=atomic has no effect"


def _forced(name: str, device: str, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    if name not in _OBSTACLES:
        raise ValueError(f"MEGAVIDEO_ATTENTION={name} is none of {', '.join(_OBSTACLES)}")
    if reason := _OBSTACLES[name](device, dtype, head_size, dropout):
        raise ValueError(f"MEGAVIDEO_ATTENTION={name}: {reason}; unset it, or name another backend")
    return name


def _preferred(
    device: str, dtype: torch.dtype, head_size: int, dropout: bool
) -> tuple[str, list[str]]:
    """The best backend that can, and why better ones cannot."""
    passed_over: list[str] = []
    for name in PREFERRED.get(device, ()):
        reason = _OBSTACLES[name](device, dtype, head_size, dropout)
        if not reason:
            return name, passed_over
        passed_over.append(f"{name} ({reason})")
    return "reference", passed_over


def library_obstacle(device: str, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    if device != "cuda":
        return "needs a CUDA device"
    if dtype not in ELEMENTS:
        return "needs bfloat16 or float16"
    if head_size not in HEAD_SIZES:
        return f"needs head size {' or '.join(map(str, HEAD_SIZES))}"
    try:
        where = torch.device(device)
        return disagreement(library.load(), where, dtype, head_size, atomic_backward())
    except RuntimeError as error:  # No library, or one that has no code for this GPU.
        return str(error)


def _flex_obstacle(device: str, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    if dropout:
        return "has no dropout"
    fast = device == "cuda" and dtype in (torch.bfloat16, torch.float16)
    return "" if fast else "needs bfloat16 or float16 on a CUDA device"


def _sdpa_obstacle(device: str, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    if dropout:
        return "would draw other zeros when recomputed"
    # On a CPU other types are for exactness, which the reference has.
    return "" if device != "cpu" or dtype == torch.float32 else "needs float32 on a CPU"


def _no_obstacle(device: str, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    return ""


_OBSTACLES: dict[str, Callable[[str, torch.dtype, int, bool], str]] = {
    "library": library_obstacle,
    "flex": _flex_obstacle,
    "sdpa": _sdpa_obstacle,
    "reference": _no_obstacle,
}
