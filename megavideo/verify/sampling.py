"""Checks of cluster sampling: what both draws are made from, and the codes that are likeliest."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from megavideo.sampling.strategy import Strategy
from megavideo.verify.compare import Row, compare

# The published super-resolution calls the same strategy with this temperature.
DSR_TEMPERATURE = 1.0


def sampling_rows(
    case: str, meta: dict[str, Any], values: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    """Compare the draws of frames, and those of super-resolution, with the published ones."""
    labels = torch.from_numpy(values["cluster_labels"].astype(np.int64))
    frames = Strategy(
        meta["temperature"], meta["top_k"], labels=labels, code_temperature=meta["temperature2"]
    )
    yield from _rows(case, values, frames, "logits", "coglm", "coglm_argmax_token")
    dsr = Strategy(
        DSR_TEMPERATURE,
        meta["top_k"],
        labels=labels,
        code_temperature=meta["dsr_temperature2"],
    )
    yield from _rows(case, values, dsr, "dsr_logits", "dsr", "dsr_argmax_tokens")


def _rows(
    case: str,
    values: Mapping[str, np.ndarray],
    strategy: Strategy,
    logits: str,
    name: str,
    tokens: str,
) -> Iterator[Row]:
    rows = torch.from_numpy(values[logits]).flatten(0, -2)
    shortlist = strategy.shortlist(rows)
    codes = strategy.code_probabilities(rows, shortlist.clusters[:, :1])
    for key, ours in (
        (f"{name}_cluster_probs_topk", shortlist.probabilities),
        (f"{name}_token_probs", codes),
    ):
        yield compare(case, key, ours.numpy(), values[key], "float32")
    # Super-resolution's row also holds the token before the generated ones.
    reference = values[tokens].flatten()[-len(rows) :]
    yield compare(case, tokens, codes.argmax(-1).numpy(), reference, "exact")
