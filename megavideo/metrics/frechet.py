"""The Fréchet distance between two sets of features, each taken as a Gaussian, in float64.

    d = |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))

With I3D's features of clips this is FVD (Unterthiner et al. 2018, arXiv:1812.01717); the distance
itself is from Dowson and Landau (1982). The last trace is the sum of the singular values of
C1^(1/2) C2^(1/2), where roots come from eigenvalues: that needs no root of a matrix that is not
symmetric, so singular covariances, as of fewer clips than features, do no harm.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megavideo.log import log


@dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D], float64."""

    mean: Tensor
    covariance: Tensor


def fit(features: Tensor) -> Gaussian:
    """The Gaussian of features [n, D]; the covariance divides by n - 1.

    Raises: ValueError if there are fewer than two rows, or one is not finite.
    """
    count, size = features.shape
    if count < 2:
        raise ValueError(f"{count} clips: a distance needs at least two on either side")
    if not features.isfinite().all():
        rows = (~features.isfinite().all(1)).nonzero().flatten()
        raise ValueError(
            f"features of {len(rows)} of {count} clips are not finite, as of {rows[0]}"
        )
    if count <= size:
        log.warning(
            "%d clips for %d features: the distance is larger than it would be of many clips; "
            "compare it only with distances of as many", count, size,
        )  # fmt: skip
    mean = features.double().mean(0)
    centred = features.double() - mean
    return Gaussian(mean, centred.T @ centred / (count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Of two Gaussians; at least 0.

    Raises: ValueError if they are of different features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"{len(a.mean)} features against {len(b.mean)}: use one network for both")
    apart = (a.mean - b.mean).square().sum()
    shared = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    distance = apart + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(0.0, float(distance))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root; eigenvalues that are only rounding noise count as zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > noise, 0).sqrt()) @ vectors.T
