"""Which image codes look alike: k-means over the codebook, and the file that holds the answer.

The file is a .npy array of integers, one a code. CogView2's cluster_label2.npy (20,000 codes, 500
clusters) is such a file.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megavideo.files import atomic_write


def cluster_codes(codebook: Tensor, clusters: int, seed: int, rounds: int = 100) -> Tensor:
    """Labels int64 [K] of k-means on the rows of `codebook`, [K, D]; no cluster is empty.

    Starts from k-means++ and stops when no code changes its cluster, after `rounds` at the latest.

    Raises: ValueError if there are fewer different rows than clusters.
    """
    rows = codebook.double()
    different = len(rows.unique(dim=0))
    if not 1 <= clusters <= different:
        raise ValueError(
            f"clusters={clusters} of a codebook with {different} different codes: use 1 to "
            f"{different}"
        )
    centres = _spread(rows, clusters, torch.Generator().manual_seed(seed))
    labels = _nearest(rows, centres)
    for _ in range(rounds):
        centres = _centres(rows, labels, centres)
        moved = _nearest(rows, centres)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def save_labels(path: Path, labels: Tensor) -> None:
    """Write a label file, whole or not at all."""
    with atomic_write(path) as file:
        np.save(file, labels.numpy())


def load_labels(path: Path, codes: int) -> Tensor:
    """Read the labels of `codes` image codes, int64 [codes].

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds no labels, or those of another number of codes.
    """
    remedy = f"{codes} integers below {codes}: make them with `megavideo cluster-codes`"
    try:
        with open(path, "rb") as file:
            labels = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:  # what numpy says names no file
        raise ValueError(f"{path} is no .npy file ({error}); labels are {remedy}") from error
    whole = labels.dtype.kind in "iu" and labels.shape == (codes,)
    if not whole or not 0 <= labels.min() <= labels.max() < codes:
        raise ValueError(
            f"{path} holds {labels.dtype} of shape {list(labels.shape)}; labels are {remedy}"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _spread(rows: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Centres far from each other: each next one drawn by squared distance (k-means++)."""
    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    distance = (rows - rows[chosen[0]]).square().sum(1)
    while len(chosen) < clusters:
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
        distance = torch.minimum(distance, (rows - rows[chosen[-1]]).square().sum(1))
    return rows[chosen]


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Each row's nearest centre; a centre that would have none keeps the row nearest to it."""
    distance = torch.cdist(rows, centres)
    labels = distance.argmin(1)
    for empty in (torch.bincount(labels, minlength=len(centres)) == 0).nonzero().flatten():
        counts = torch.bincount(labels, minlength=len(centres))
        spare = counts[labels] > 1
        labels[distance[:, empty].masked_fill(~spare, torch.inf).argmin()] = empty
    return labels


def _centres(rows: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """The mean of each cluster's rows."""
    sums = torch.zeros_like(centres).index_add_(0, labels, rows)
    return sums / torch.bincount(labels, minlength=len(centres))[:, None]
