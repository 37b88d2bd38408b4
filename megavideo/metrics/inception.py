"""Inception Score: are single clips clear to a classifier, and all of them diverse?

exp(mean KL(p(class | clip) || p(class))), p(class) being the mean over the clips. (Salimans et al.
2016, arXiv:1606.03498; on video with C3D: Saito et al. 2017, arXiv:1611.06624.)
"""

import torch
from torch import Tensor


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation of the score over `splits` equal parts of logits [n, classes].

    Between 1 and the number of classes.
    Raises: ValueError if there are fewer than two clips a part, or logits are not finite.
    """
    if not 1 <= splits <= len(logits) // 2:  # the score of a clip alone is 1, whatever it shows
        raise ValueError(f"{len(logits)} clips in {splits} parts: use at least two clips a part")
    if not logits.isfinite().all():
        raise ValueError("the classifier's logits are not all finite")
    scores = torch.stack([_score(part) for part in logits.double().tensor_split(splits)])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    log_mean = log_p.logsumexp(0) - torch.tensor(len(log_p), dtype=log_p.dtype).log()
    return (log_p.exp() * (log_p - log_mean)).sum(1).mean().exp()
