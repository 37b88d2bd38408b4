"""FLOPs that a dry run promises, beside torch's own counter."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from megavideo.sampling.strategy import Strategy
from megavideo.superres.upsample import TOP_K, refine, upsample
from megavideo.superres.work import direct_flops, iterative_flops
from tests.unit.superres.samples import DIRECT, ITERATIVE, direct, iterative

TEXT = [21, 25, 30]


def products(counter: FlopCounterMode) -> int:
    """Of the matrix products; attention runs in an operator of ours, which torch cannot count."""
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for name, flops in counts.items() if str(name) in ("aten.mm", "aten.addmm"))


def test_every_product_of_an_enlarged_frame_is_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        upsample(direct(), TEXT, torch.zeros(1, 4, dtype=torch.int64), Strategy(), seed=0)
    coarse = 5 + 4
    pairs = coarse * coarse + 36 * (9 * 5 + 5 * 5)
    attention = DIRECT.layers * 4 * pairs * DIRECT.hidden
    assert products(counter) == direct_flops(DIRECT) - attention


def test_every_product_of_the_rounds_is_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        refine(iterative(), TEXT, torch.zeros(1, 36, dtype=torch.int64), seed=0)
    pairs = 5 * 5 + 36 * (5 + 9 * 5)
    attention = len(TOP_K) * ITERATIVE.layers * 4 * pairs * ITERATIVE.hidden
    assert products(counter) == iterative_flops(ITERATIVE) - attention
