"""Inception Score between its bounds, and as its formula says."""

import numpy as np
import pytest
import torch

from megavideo.metrics.inception import inception_score


def test_the_bounds_are_one_and_the_number_of_classes() -> None:
    same = torch.tensor([[1.0, 5.0, -2.0]]).expand(20, -1)
    assert inception_score(same, 4) == pytest.approx((1, 0))
    sure = 1000 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure, 4) == pytest.approx((5, 0))


def test_random_logits_score_as_the_formula_says() -> None:
    logits = np.random.default_rng(0).normal(size=(33, 6)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = [
        np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.array_split(p, 3)
    ]
    expected = (np.mean(scores), np.std(scores))
    assert inception_score(torch.from_numpy(logits), 3) == pytest.approx(expected, rel=1e-12)


def test_parts_of_one_clip_and_broken_logits_are_refused() -> None:
    with pytest.raises(ValueError, match="19 clips in 10 parts: use at least two clips a part"):
        inception_score(torch.zeros(19, 4))
    with pytest.raises(ValueError, match="not all finite"):
        inception_score(torch.full((3, 4), torch.nan), 1)
