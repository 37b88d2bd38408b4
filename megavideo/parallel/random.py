"""Random numbers under tensor parallelism: the same where activations are, distinct where cut.

All ranks of a replica seed torch alike and draw alike, so what they compute on the same activations
(dropout of hidden states) is the same. Where each rank holds other activations (its heads, its
slots) the zeros must differ: a rank's seed is then one of `axis.size` numbers drawn from the common
stream, which goes on alike everywhere. A recomputed layer, for which torch restores the common
stream, thus draws the same again.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megavideo.parallel.mesh import Axis


def distinct_seed(axis: Axis) -> Tensor:
    """A seed of this rank's own, int64 scalar on the CPU, drawn from torch's default generator."""
    return torch.randint(2**62, (axis.size,))[axis.rank]


@contextmanager
def distinct_randomness(axis: Axis) -> Iterator[None]:
    """Other random numbers on each rank in here; after it the common stream goes on."""
    if axis.size == 1:
        yield
        return
    seed = int(distinct_seed(axis))
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
