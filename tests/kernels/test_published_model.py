"""The published model's forward and backward pass with the emulated kernels as its attention."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megavideo.layout.rules import Rule, encode_rule
from megavideo.model import attention
from megavideo.ops import library as library_module
from megavideo.verify import command
from tests.kernels.test_interval import library

VECTORS = Path(__file__).parents[1] / "reference" / "vectors"
HEAD_SIZE = 64  # the smallest that the kernels have

# Of an array's largest value. Rounding to bfloat16 gives up to 0.012, a wrong shift gives 1.4.
TOLERANCE = 0.03


def by_kernels(
    image_qkv: Tensor,
    text_kv: Tensor,
    text_length: Tensor,
    rule: Rule,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """`local_attention` in bfloat16, with heads filled up with zeros and scores scaled back."""
    size = image_qkv.shape[-1]
    back = torch.tensor([(HEAD_SIZE / size) ** 0.5, 1.0, 1.0])[:, None, None]
    image, text = (
        torch.nn.functional.pad(tensor, (0, HEAD_SIZE - size)).bfloat16()
        for tensor in (image_qkv * back, text_kv)
    )
    out, _ = torch.ops.megavideo.local_attention(
        image, text, text_length, encode_rule(rule), dropout, torch.tensor(0), "library"
    )
    return out.unflatten(2, (-1, HEAD_SIZE))[..., :size].flatten(2).to(image_qkv.dtype)


@pytest.mark.parametrize(
    "case",
    [
        "pub1_stage1_full",
        "pub3_stage2_window",
        "pub4_stage2_fulllayout_unpatched",  # 64 text slots and 5 frames of 20 x 20, as trained
    ],
)
def test_published_arrays_are_reproduced_by_the_kernels(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = library()
    monkeypatch.setattr(library_module, "load", lambda: kernels)
    monkeypatch.setattr(attention, "local_attention", by_kernels)
    rows = list(command._array_rows(VECTORS / f"{case}.v.npz", []))
    assert kernels.counters.mma > 0
    worst = max(rows, key=lambda row: row.error)
    assert worst.error < TOLERANCE, worst
