"""How a token is drawn from logits: temperature, top-k, top-p, and CogView's cluster sampling.

Cluster sampling groups image codes that look alike (see clusters.py). The probability of a whole
cluster decides first, so that a colour is not lost because many codes share it: the k likeliest
clusters stay, one of them is drawn, then a code inside it. (docs/generate.md 4.)

B rows, K image codes, C clusters. Softmax is computed in float32, draws in float64.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Shortlist(NamedTuple):
    """The k likeliest clusters: probabilities among themselves and numbers, both [B, k]."""

    probabilities: Tensor
    clusters: Tensor


@dataclass(frozen=True, eq=False)
class Strategy:
    """Settings of one draw; `strategy(logits, uniforms)` draws.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest code.
        top_k: codes that stay, or clusters if there are any; 0 keeps all.
        top_p: the likeliest codes whose probabilities reach this sum stay; not used with clusters.
        labels: int64 [K], each code's cluster; None samples codes directly.
        code_temperature: divides the logits once more for the draw inside a cluster.

    Raises ValueError for settings that exclude each other.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    labels: Tensor | None = None
    code_temperature: float = 1.0

    def __post_init__(self) -> None:
        finite = 0 <= self.temperature < math.inf  # not so of NaN
        if not finite or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}: use "
                "at least 0, at least 0, and above 0 up to 1"
            )
        if self.labels is not None and self.top_p < 1:
            raise ValueError(f"top_p={self.top_p} has no effect on clusters; use top_k alone")
        if not 0 < self.code_temperature < math.inf:
            raise ValueError(f"code_temperature={self.code_temperature} must be above 0")

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Codes int64 [B] from logits [B, K] and two numbers of [0, 1) for each row, [B, 2]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        if self.labels is None:
            return pick(self.code_probabilities(logits), uniforms[:, 1])
        shortlist = self.shortlist(logits)
        place = pick(shortlist.probabilities, uniforms[:, 0])
        cluster = shortlist.clusters.gather(-1, place[:, None])
        return pick(self.code_probabilities(logits, cluster), uniforms[:, 1])

    def shortlist(self, logits: Tensor) -> Shortlist:
        """The clusters that may be drawn, most likely first."""
        labels = self._labels(logits)
        codes = _softmax(logits / self.temperature)
        mass = codes.new_zeros(len(codes), int(labels.max()) + 1)
        mass.index_add_(1, labels, codes)
        top = mass.topk(min(self.top_k or mass.shape[1], mass.shape[1]))
        return Shortlist(top.values / top.values.sum(-1, keepdim=True), top.indices)

    def code_probabilities(self, logits: Tensor, cluster: Tensor | None = None) -> Tensor:
        """What the code is drawn from, [B, K]; `cluster` [B, 1] is the drawn one, if there are any.

        Raises: ValueError for temperature 0, which draws nothing.
        """
        if self.temperature == 0:
            raise ValueError("temperature 0 draws nothing: it takes the likeliest code")
        logits = logits / self.temperature
        if cluster is not None:
            outside = self._labels(logits) != cluster
            return _softmax(logits.masked_fill(outside, -torch.inf) / self.code_temperature)
        if self.top_k:
            kept = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kept, -torch.inf)
        probabilities = _softmax(logits)
        return probabilities if self.top_p == 1 else _nucleus(probabilities, self.top_p)

    def _labels(self, logits: Tensor) -> Tensor:
        assert self.labels is not None and len(self.labels) == logits.shape[-1]
        return self.labels.to(logits.device)


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Places int64 [B] at which the cumulated `probabilities` [B, K] pass `uniform` [B].

    One number in, one place out: what is drawn depends on nothing else, not on the other rows.
    """
    cumulated = probabilities.double().cumsum(-1)
    target = uniform.to(cumulated.device)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True)[:, 0]


def _softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The likeliest codes that together reach `top_p`; the others get 0, and nothing is scaled."""
    values, codes = probabilities.sort(-1, descending=True)
    before = values.cumsum(-1) - values
    return torch.zeros_like(values).scatter(-1, codes, values.masked_fill(before >= top_p, 0))
