"""Which program computes local attention: what each backend can do, and which is taken.

    library    the fused CUDA kernels (kernels/local_attention/)
    flex       torch's FlexAttention
    sdpa       torch's scaled_dot_product_attention, block by block
    reference  plain torch; the meaning of all the others

The preferred one is looked up in a table (attention_table.py). The environment variable
MEGAVIDEO_ATTENTION names one for a whole run instead, to compare or to work around.
MEGAVIDEO_ATTENTION_BACKWARD=atomic lets the kernels go backward in one pass that adds up
the gradients of queries in whatever order; `deterministic`, the default, is two passes whose bits
are the same in each run (kernels/local_attention/README.md has the arithmetic of both).
"""

import os
from collections.abc import Callable
from functools import lru_cache

import torch

from megavideo.layout.rules import Family
from megavideo.log import log
from megavideo.ops import library
from megavideo.ops.attention_table import Case, preference
from megavideo.ops.c_call import ELEMENTS, HEAD_SIZES
from megavideo.ops.selfcheck import disagreement


@lru_cache(maxsize=64)
def choose(device: str, dtype: torch.dtype, head_size: int, dropout: bool, family: Family) -> str:
    """The backend for a type of device, elements, D, dropout and a family of rules.

    Says in the log, once, what was chosen, by what, and why better ones were not.

    Raises:
        ValueError: if MEGAVIDEO_ATTENTION names a backend that cannot do it, or
            MEGAVIDEO_ATTENTION_TABLE a file that is no table.
    """
    case = Case(device, dtype, head_size, dropout, family)
    forced = os.environ.get("MEGAVIDEO_ATTENTION")
    backend, why = _forced(forced, case) if forced else _preferred(case)
    log.info("%s: %s%s; %s", case, backend, _said_of_backward(backend), why)
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


def _forced(name: str, case: Case) -> tuple[str, str]:
    if name not in _OBSTACLES:
        raise ValueError(f"MEGAVIDEO_ATTENTION={name} is none of {', '.join(_OBSTACLES)}")
    if reason := _obstacle(name, case):
        raise ValueError(f"MEGAVIDEO_ATTENTION={name}: {reason}; unset it, or name another backend")
    return name, "MEGAVIDEO_ATTENTION names it"


def _preferred(case: Case) -> tuple[str, str]:
    """The best backend that can, and what says that it is the best of those."""
    preferred = preference(case)
    why = [f"order by {preferred.source}"]
    for name in preferred.order:
        reason = _obstacle(name, case)
        if not reason:
            return name, "; ".join(why)
        why.append(f"not {name} ({reason})")
    raise AssertionError("the reference can do everything")


def _obstacle(name: str, case: Case) -> str:
    return _OBSTACLES[name](case.device, case.dtype, case.head_size, case.dropout)


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
