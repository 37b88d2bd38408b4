"""Fréchet distance: scipy's on random data, known answers, and covariances that are singular."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from megavideo.metrics.frechet import Gaussian, fit, frechet_distance


def draw(count: int, size: int, seed: int) -> Tensor:
    """Correlated features with a mean."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(count, size)) @ rng.normal(size=(size, size)) + rng.normal(size=size)
    return torch.from_numpy(mixed)


def distance(a: Tensor, b: Tensor) -> float:
    return frechet_distance(fit(a), fit(b))


@pytest.mark.parametrize(("count", "size"), [(40, 7), (300, 64), (12, 1)])
def test_random_data_is_as_far_apart_as_scipy_says(count: int, size: int) -> None:
    a, b = draw(count, size, 0), draw(count + 5, size, 1)
    (mean_a, cov_a), (mean_b, cov_b) = (
        (x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False).reshape(size, size)) for x in (a, b)
    )
    shared = np.real(np.trace(sqrtm(cov_a @ cov_b)))
    expected = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * shared
    assert distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert distance(b, a) == pytest.approx(expected, rel=1e-9)


def gaussian(mean: float, variances: list[float]) -> Gaussian:
    size = len(variances)
    diagonal = torch.tensor(variances, dtype=torch.float64).diag()
    return Gaussian(torch.full((size,), mean, dtype=torch.float64), diagonal)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (gaussian(0, [1, 4, 9]), gaussian(2, [1, 4, 9]), 12),  # a shift alone
        (gaussian(0, [1, 4, 9]), gaussian(0, [4, 4, 4]), 1 + 0 + 1),  # (s - t)^2 an axis
        (gaussian(1, [4, 0, 0]), gaussian(1, [0, 9, 0]), 13),  # nothing shared: s^2 + t^2
        (gaussian(3, [0, 0]), gaussian(1, [0, 0]), 8),  # two points
        (gaussian(0, [1e-12, 1e6]), gaussian(0, [1e-12, 4e6]), 1e6),  # of all scales
    ],
)
def test_known_distances(a: Gaussian, b: Gaussian, expected: float) -> None:
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_the_same_clips_are_at_distance_zero_also_if_there_are_few() -> None:
    for count, size in ((200, 8), (5, 64), (2, 400)):
        a = draw(count, size, 2)
        assert distance(a, a) < 1e-9 * float(a.var(0).sum())


def test_fewer_clips_than_features_change_nothing_but_the_space() -> None:
    """Seven clips span six directions; rotated into 100 features they are as far apart."""
    a, b = draw(7, 6, 3), draw(7, 6, 4)
    turn = torch.linalg.qr(draw(100, 100, 5)).Q[:6]
    assert distance(a @ turn, b @ turn) == pytest.approx(distance(a, b), rel=1e-9)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="1 clips: a distance needs at least two"):
        fit(draw(1, 4, 0))
    bad = draw(4, 4, 0)
    bad[2, 1] = torch.nan
    with pytest.raises(ValueError, match="features of 1 of 4 clips are not finite, as of 2"):
        fit(bad)
    with pytest.raises(ValueError, match="3 features against 4"):
        frechet_distance(fit(draw(9, 3, 0)), fit(draw(9, 4, 0)))
