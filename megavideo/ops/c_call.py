"""What every call of libmegavideo needs: its types as Python sees them, aligned rows, a stream."""

import ctypes
from typing import Any

import torch
from torch import Tensor

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
HEAD_SIZES = (64, 128)
_ALIGNMENT = 16


class Strides(ctypes.Structure):
    """MegavideoStrides."""

    _fields_ = [(name, ctypes.c_int64) for name in ("sample", "slot", "part", "head")]


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, copied if some row of a head does not start at a multiple of 16 bytes."""
    size = tensor.element_size()
    starts = (tensor.data_ptr(), *(stride * size for stride in tensor.stride()[:-1]))
    rows = tensor.stride(-1) == 1 and all(start % _ALIGNMENT == 0 for start in starts)
    return tensor if rows else tensor.clone(memory_format=torch.contiguous_format)


def dropout_threshold(dropout: float) -> int:
    """How many of 256 values of a random byte drop a probability.

    Raises:
        ValueError: if no byte would, or all: then the kernels cannot do what was asked.
    """
    threshold = round(256 * dropout)
    if dropout and not 0 < threshold < 256:
        raise ValueError(
            f"attention dropout {dropout} rounds to {threshold}/256 in the kernels; use 0, or from "
            "0.002 to 0.998, or MEGAVIDEO_ATTENTION=reference"
        )
    return threshold


def call(library: Any, function: str, problem: ctypes.Structure, device: torch.device) -> None:
    """Run a function of `library` on torch's stream; raises RuntimeError if it reports an error."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            status = getattr(library, function)(ctypes.byref(problem), ctypes.c_void_p(stream))
    else:
        status = getattr(library, function)(ctypes.byref(problem), None)
    if status:
        reason = library.megavideo_error_text(status).decode()
        raise RuntimeError(f"{function} returned {status}: {reason}")
