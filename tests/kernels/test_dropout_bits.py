"""The dropout hash looks random: in rate, between neighbours, heads and seeds."""

import numpy as np
import pytest

from tests.kernels.dropout_bits import kept_bits

SLOTS = 1024
THRESHOLD = 26  # 0.1, rounded to n / 256


@pytest.fixture(scope="module")
def dropped() -> np.ndarray:
    """bool [8 heads, SLOTS, SLOTS]."""
    return ~kept_bits(2**40 + 7, np.arange(8), SLOTS, SLOTS, THRESHOLD)


def deviation(observed: np.ndarray, rate: float) -> float:
    """Standard deviations by which the mean of independent bits is off its rate."""
    return float((observed.mean() - rate) / np.sqrt(rate * (1 - rate) / observed.size))


def test_rate_is_the_threshold_overall_and_in_every_head_row_and_column(dropped) -> None:
    rate = THRESHOLD / 256
    assert abs(deviation(dropped, rate)) < 4
    for axes in [(1, 2), (0, 2), (0, 1)]:
        counts = dropped.mean(axes)
        spread = np.sqrt(rate * (1 - rate) * counts.size / dropped.size)
        assert np.abs(counts - rate).max() < 5 * spread
        assert counts.size < 100 or 0.85 < counts.std() / spread < 1.15


@pytest.mark.parametrize("dq", [0, 1, 2, 4, 8, 16, 64, 512])
@pytest.mark.parametrize("dk", [0, 1, 2, 4, 8, 16, 64, 512])
def test_neighbours_are_independent(dropped, dq: int, dk: int) -> None:
    """The four bytes of one word (distance 8) as much as any others."""
    if dq == dk == 0:
        return
    both = dropped[:, dq:, dk:] & dropped[:, : SLOTS - dq, : SLOTS - dk]
    assert abs(deviation(both, (THRESHOLD / 256) ** 2)) < 4.5


def test_heads_are_independent(dropped) -> None:
    for head in range(1, 8):
        assert abs(deviation(dropped[0] & dropped[head], (THRESHOLD / 256) ** 2)) < 4.5


@pytest.mark.parametrize("other", [1, 2, 2**31, 2**32, 2**61])
def test_seeds_that_differ_in_one_bit_are_independent(other: int) -> None:
    first, second = (~kept_bits(seed, np.arange(2), SLOTS, SLOTS, 128) for seed in (0, other))
    assert abs(deviation(first & second, 0.25)) < 4.5


def test_no_head_repeats_another_with_slots_exchanged() -> None:
    """With one key, `mix(index ^ key)` of two heads would be the same mask, slots XORed."""
    words = [np.packbits(kept_bits(5, np.array([head]), 256, 256, 128)[0]) for head in range(64)]
    rows = {word.reshape(256, -1)[row].tobytes() for word in words for row in range(256)}
    assert len(rows) == 64 * 256
