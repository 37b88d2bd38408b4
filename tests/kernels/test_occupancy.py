"""Shared memory: as many blocks fit on a multiprocessor as the kernels' head comments say."""

import pytest

from megavideo.ops import interval, neighbourhood
from tests.kernels import test_interval, test_neighbourhood
from tests.kernels.watched import WatchedLibrary

# KiB of shared memory of a multiprocessor; each block takes one more than it asks for.
A100, H100 = 164, 228


def blocks(kernels: WatchedLibrary, multiprocessor: int) -> int:
    """Blocks of the last call's greediest kernel that fit."""
    return (multiprocessor << 10) // (kernels.counters.shared_bytes + 1024)


@pytest.mark.parametrize("size", [64, 128])
def test_two_blocks_of_interval_attention_share_a_multiprocessor(size: int) -> None:
    case, kernels = test_interval.Case(test_interval.FRAMES, size=size), test_interval.library()
    interval.forward(kernels, *case.inputs(), case.rule, 0.0, 0)
    assert blocks(kernels, A100) >= (3 if size == 64 else 2)
    test_interval.run(case, kernels)
    assert blocks(kernels, H100) >= 2
    test_interval.run(case, kernels, atomic=True)
    assert blocks(kernels, A100) >= 2


@pytest.mark.parametrize(("size", "forward", "backward"), [(64, 4, 3), (128, 2, 1)])
def test_blocks_of_neighbourhood_attention_share_a_multiprocessor(
    size: int, forward: int, backward: int
) -> None:
    """With the published 9x5 window; 16x16 queries have a block that no border cuts."""
    rules = (test_neighbourhood.same(16, 16, 9, 5),)
    case, kernels = test_neighbourhood.Case(rules, size=size), test_neighbourhood.library()
    neighbourhood.forward(kernels, *case.inputs(), rules, 0.0, 0)
    assert blocks(kernels, H100) == forward
    test_neighbourhood.run(case, kernels)
    assert blocks(kernels, H100) == backward
