"""What lies between a block's matrix products, as functions that torch.compile can fuse.

These definitions are the meaning; `compiled()` is torch.compile of these very functions. What a
function reads and writes, in states [slots, h] (frozen norms; forward + backward):

                      op by op    fused
    residual_norms     7 +  9     4 + 6
    residual_norm      5 +  3     3 + 3
    mix                3 + 11     3 + 8

Left out: GELU and a norm that stands alone, which are one kernel either way; dropout, so that a run
draws the same zeros compiled or not (fused it would save 2 + 2 states, on a GPU; on a CPU the code
that Inductor generates draws three times slower than torch).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megavideo.log import log
from megavideo.ops.cache import keep_code_private

Affine = tuple[Tensor, Tensor]  # weight and bias of a LayerNorm, [h] each


def layer_norm(x: Tensor, affine: Affine, eps: float) -> Tensor:
    """LayerNorm over the last dimension: NVIDIA apex's on a GPU where apex is there, but never in
    what is compiled, which could not look into it.
    """
    weight, bias = affine
    if x.is_cuda and not torch.compiler.is_compiling() and (fused := _apex_layer_norm()):
        result: Tensor = fused(x, weight, bias, tuple(weight.shape), eps)
        return result
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def residual_norm(x: Tensor, branch: Tensor, norm: Affine, eps: float) -> Tensor:
    """x + LN(branch)."""
    return x + layer_norm(branch, norm, eps)


def residual_norms(
    x: Tensor, branch: Tensor, norm: Affine, following: Affine, eps: float
) -> tuple[Tensor, Tensor]:
    """The new residual stream x + LN(branch), and its LN, with which the next branch starts."""
    x = x + layer_norm(branch, norm, eps)
    return x, layer_norm(x, following, eps)


def mix(spatial: Tensor, temporal: Tensor, share: Tensor) -> Tensor:
    """share * spatial + (1 - share) * temporal; `share` [h] is between 0 and 1."""
    return torch.lerp(temporal, spatial, share)


@dataclass(frozen=True)
class Pointwise:
    """The functions of this file, as they are or compiled."""

    residual_norm: Callable[[Tensor, Tensor, Affine, float], Tensor]
    residual_norms: Callable[[Tensor, Tensor, Affine, Affine, float], tuple[Tensor, Tensor]]
    mix: Callable[[Tensor, Tensor, Tensor], Tensor]


EAGER = Pointwise(residual_norm, residual_norms, mix)


@lru_cache(maxsize=1)
def compiled() -> Pointwise:
    """The same, compiled when first called with inputs of a kind: shapes, types, what needs
    gradients. More kinds than torch allows (torch._dynamo.config.recompile_limit) are an error.
    """
    alone = "NVIDIA apex's" if _apex_layer_norm() else "torch's"
    log.info("compiled: residual sums with their LayerNorms, mixture; LayerNorm alone: %s", alone)
    return Pointwise(_compile(residual_norm), _compile(residual_norms), _compile(mix))


def check_compiler(device: torch.device) -> None:
    """Compile a line for `device`, so that a machine that cannot says so before it trains.

    Raises:
        ValueError: with torch's reason.
    """
    try:
        _compile(_line)(torch.ones(8, device=device))
    except RuntimeError as error:  # Of Dynamo, of Inductor, of the C++ compiler: all are.
        raise ValueError(
            f"parallel.compile=true, but torch.compile cannot build code for {device.type} here: "
            f"{_reason(error)}; install {_NEEDED[device.type]}, or set parallel.compile=false"
        ) from error


BACKEND = "inductor"
_NEEDED = {"cpu": "a C++ compiler (g++) and Python's headers", "cuda": "Triton and a C compiler"}


def _reason(error: RuntimeError) -> str:
    """The first line of the innermost error."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no reason given'}"


def _line(x: Tensor) -> Tensor:
    return 2 * x + 1


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    keep_code_private()
    result: Callable[..., Any] = torch.compile(
        function, backend=BACKEND, fullgraph=True, dynamic=False
    )
    return result


@lru_cache(maxsize=1)
def _apex_layer_norm() -> Callable[..., Tensor] | None:
    if not torch.cuda.is_available():
        return None
    try:
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine
    except ImportError:  # PyPI's package of that name has no such module either
        log.info("LayerNorm: torch (NVIDIA apex is not installed)")
        return None
    log.info("LayerNorm: NVIDIA apex fused_layer_norm_affine")
    found: Callable[..., Tensor] = fused_layer_norm_affine
    return found
