"""The order of training: which sample is at position p, for p = 0, 1, 2, ... without end.

Every epoch is a permutation of all samples. Shards are permuted, W at a time make a window, and the
samples of a window are permuted among each other, so that a node needs the shards of two windows at
a time. The sample at a position is a function of (seed, position) only: resuming needs the number
of samples consumed, and ranks take their parts by counting.

Only `Philox.random_raw` and a stable argsort are used. numpy promises the former across versions,
unlike the methods of `Generator`, which may draw differently in any release.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Draws for different purposes come from different Philox keys.
SHARDS, SAMPLES, SUBSTITUTES, FRAMES = range(4)


def draw(seed: int, purpose: int, first: int, second: int, count: int) -> np.ndarray:
    """`count` uniform uint64 that depend on the arguments alone."""
    # The low counter word counts the draws; the others say which stream.
    key = [seed, purpose]
    return np.random.Philox(key=key, counter=[0, first, second, 0]).random_raw(count)


def below(bound: int, raw: int) -> int:
    """A uniform 64-bit `raw` scaled to [0, bound)."""
    return raw * bound >> 64


def permutation(seed: int, purpose: int, first: int, second: int, size: int) -> np.ndarray:
    """A permutation of range(size), int64, that depends on the arguments alone."""
    return np.argsort(draw(seed, purpose, first, second, size), kind="stable")


@dataclass(frozen=True)
class Place:
    """Where a position falls: its epoch, and the sample's id."""

    epoch: int
    sample: int


class Order:
    """position -> sample.

    Args:
        shard_of: [n] shard of every sample that takes part, rising.
        samples: [n] ids of those samples.
        seed: any other seed is another order.
        window_shards: W; at least the number of shards gives one full permutation an epoch.
    """

    def __init__(self, shard_of: np.ndarray, samples: np.ndarray, seed: int, window_shards: int):
        if not len(samples):
            raise ValueError("no sample to put in order")
        self.seed = seed
        self.window_shards = window_shards
        self.samples = samples
        # Samples of the s-th shard that has any: samples[start[s] : start[s + 1]].
        self._shards, starts = np.unique(shard_of, return_index=True)
        self._starts = np.append(starts, len(samples))
        self._epoch_plan = lru_cache(maxsize=2)(self._plan_epoch)
        self._window_samples = lru_cache(maxsize=4)(self._permute_window)

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.samples)

    def __getitem__(self, position: int) -> Place:
        epoch, offset = divmod(position, len(self))
        _, ends = self._epoch_plan(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        start = int(ends[window - 1]) if window else 0
        return Place(epoch, int(self._window_samples(epoch, window)[offset - start]))

    def substitute(self, position: int, attempt: int) -> int:
        """The sample that stands in for the damaged one at `position`, as the `attempt`-th."""
        raw = draw(self.seed, SUBSTITUTES, position, attempt, 1)
        return int(self.samples[below(len(self), int(raw[0]))])

    def shards_near(self, position: int) -> Sequence[int]:
        """The shards of the window at `position` and of the next in its epoch, as needed."""
        epoch, offset = divmod(position, len(self))
        shards, ends = self._epoch_plan(epoch)
        window = int(np.searchsorted(ends, offset, side="right"))
        return self._shards[self._window_shards(shards, window, 2)].tolist()

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in this epoch's order, and the offset at which each window ends."""
        shards = permutation(self.seed, SHARDS, epoch, 0, len(self._shards))
        counts = np.diff(self._starts)[shards]
        last_of_window = np.arange(self.window_shards - 1, len(shards), self.window_shards)
        if len(shards) % self.window_shards:
            last_of_window = np.append(last_of_window, len(shards) - 1)
        return shards, np.cumsum(counts)[last_of_window]

    def _window_shards(self, shards: np.ndarray, window: int, windows: int = 1) -> np.ndarray:
        return shards[window * self.window_shards : (window + windows) * self.window_shards]

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        """The samples of a window in the order in which they are visited."""
        shards, _ = self._epoch_plan(epoch)
        ranges = [
            self.samples[self._starts[s] : self._starts[s + 1]]
            for s in self._window_shards(shards, window)
        ]
        together = np.concatenate(ranges)
        return together[permutation(self.seed, SAMPLES, epoch, window, len(together))]


def micro_step_positions(
    consumed: int, step: int, micro_batch: int, dp_rank: int, dp_size: int
) -> range:
    """The positions of one rank in micro step `step` after `consumed` samples (Megatron's layout).

    Ranks take neighbouring runs of `micro_batch` positions, so a global batch is the same run of
    positions however it is cut into ranks and accumulation steps.
    """
    start = consumed + (step * dp_size + dp_rank) * micro_batch
    return range(start, start + micro_batch)
