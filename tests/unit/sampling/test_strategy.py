"""Drawing tokens: what may be drawn, how often it is, and what a draw depends on."""

from collections import Counter

import numpy as np
import pytest
import torch

from megavideo.sampling.randomness import uniforms
from megavideo.sampling.strategy import Strategy, pick

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]])


def drawn(strategy: Strategy, times: int = 4000) -> dict[int, float]:
    """Share of each code in many draws."""
    numbers = torch.from_numpy(uniforms(0, "test", times))
    codes = strategy(LOGITS.expand(times, -1), numbers)
    return {code: count / times for code, count in Counter(codes.tolist()).items()}


def test_draws_follow_the_softmax_of_logits_over_temperature() -> None:
    for temperature in (0.7, 1.0, 2.0):
        shares = drawn(Strategy(temperature))
        for code, probability in enumerate((LOGITS[0] / temperature).softmax(-1).tolist()):
            assert shares.get(code, 0.0) == pytest.approx(probability, abs=0.03)


def test_top_k_keeps_k_codes_and_their_proportions() -> None:
    shares = drawn(Strategy(top_k=2))
    assert shares.keys() == {0, 1}
    assert shares[0] == pytest.approx(np.e / (np.e + 1), abs=0.03)


def test_top_p_keeps_the_fewest_codes_that_reach_it() -> None:
    cumulated = LOGITS[0].softmax(-1).cumsum(-1)
    for kept in (1, 2, 3):
        assert drawn(Strategy(top_p=float(cumulated[kept - 1]) - 0.01)).keys() == set(range(kept))


def test_temperature_zero_takes_the_likeliest() -> None:
    assert drawn(Strategy(temperature=0)).keys() == {0}


def test_clusters_are_drawn_by_their_mass_and_codes_inside_by_theirs() -> None:
    labels = torch.tensor([1, 0, 0, 0, 2])
    strategy = Strategy(top_k=2, labels=labels, code_temperature=0.5)
    shares = drawn(strategy)
    probabilities = LOGITS[0].softmax(-1)
    alone, together = float(probabilities[0]), float(probabilities[1:4].sum())
    assert shares[0] == pytest.approx(alone / (alone + together), abs=0.03)
    inside = (LOGITS[0, 1:4] / 0.5).softmax(-1)
    for code, share in enumerate(inside.tolist(), start=1):
        assert shares[code] == pytest.approx(share * (1 - shares[0]), abs=0.03)
    assert 4 not in shares


def test_settings_that_mean_nothing_are_refused() -> None:
    labels = torch.zeros(5, dtype=torch.int64)
    for wrong in (
        {"temperature": -1.0},
        {"temperature": np.nan},
        {"temperature": np.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 0.5, "labels": labels},
        {"code_temperature": 0.0},
        {"code_temperature": np.nan},
    ):
        with pytest.raises(ValueError, match="="):
            Strategy(**wrong)


def test_a_draw_depends_on_its_own_row_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 50)
    numbers = torch.from_numpy(uniforms(3, "rows", 7))
    for strategy in (
        Strategy(top_k=9),
        Strategy(top_p=0.8),
        Strategy(top_k=4, labels=torch.arange(50) % 10),
    ):
        together = strategy(logits, numbers)
        alone = [strategy(logits[i : i + 1], numbers[i : i + 1]) for i in range(7)]
        assert torch.equal(together, torch.cat(alone))


def test_picking_never_takes_what_has_no_probability() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]] * 3)
    ends = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert pick(probabilities, ends).tolist() == [1, 3, 3]


def test_numbers_are_a_function_of_seed_and_purpose() -> None:
    first = uniforms(1, "a red circle/0/keyframes/2", 400)
    assert np.array_equal(first, uniforms(1, "a red circle/0/keyframes/2", 400))
    assert np.array_equal(first[:10], uniforms(1, "a red circle/0/keyframes/2", 10))
    assert not np.intersect1d(first, uniforms(2, "a red circle/0/keyframes/2", 400)).size
    assert not np.intersect1d(first, uniforms(1, "a red circle/1/keyframes/2", 400)).size
    assert first.min() >= 0 and first.max() < 1 and abs(first.mean() - 0.5) < 0.03
    # The very numbers: a change of them would change every video.
    assert uniforms(0, "", 1).tolist() == [[0.25224827732813215, 0.5242579474663218]]
