"""Attention of some queries over some keys, and its gradient: what both plain references share.

B batch, H heads, Q queries, K keys, D head size. Computed in the type of its inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MaskedSoftmax:
    """q [B,H,Q,D], k and v [B,H,K,D], scores [B,H,Q,K] with -inf where not visible."""

    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    kept: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        visible: Tensor,
        dropout: float,
        generator: torch.Generator | None,
    ) -> "MaskedSoftmax":
        """Scores of `q` against `k`; `visible` is bool [B, 1, Q, K]. No generator, no dropout."""
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible, -torch.inf)
        return cls(q, k, v, scores, _kept(scores, dropout, generator))

    @property
    def lse(self) -> Tensor:
        """Log-sum-exp of each query's scores, [B, H, Q]."""
        return self.scores.logsumexp(-1)

    def output(self) -> Tensor:
        """[B, H, Q, D]."""
        return self._drop(self.scores.softmax(-1)) @ self.v

    def gradients(self, do: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of (q, k, v), given that of the output and the log-sum-exp."""
        probability = (self.scores - lse[..., None]).exp()
        dp = self._drop(do @ self.v.transpose(-1, -2))
        ds = probability * (dp - (dp * probability).sum(-1, keepdim=True))
        ds = ds * self.q.shape[-1] ** -0.5
        dv = self._drop(probability).transpose(-1, -2) @ do
        return ds @ self.k, ds.transpose(-1, -2) @ self.q, dv

    def _drop(self, probability: Tensor) -> Tensor:
        """Zero what is dropped, scale up the rest; its own transpose, so backward uses it too."""
        return probability if self.kept is None else probability * self.kept


def dropout_generator(dropout: float, seed: int, device: torch.device) -> torch.Generator | None:
    """Draws the same zeros in forward and backward; None without dropout."""
    return torch.Generator(device).manual_seed(seed) if dropout else None


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The references compute in float32, or in float64 for float64 inputs."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _kept(scores: Tensor, dropout: float, generator: torch.Generator | None) -> Tensor | None:
    """What probabilities are multiplied by: 0 where dropped, 1 / (1 - dropout) elsewhere."""
    if generator is None:
        return None
    drawn = torch.rand(scores.shape, generator=generator, device=scores.device)
    return (drawn >= dropout).to(scores.dtype) / (1 - dropout)
