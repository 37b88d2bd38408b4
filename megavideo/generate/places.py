"""Where a channel's cache keeps keys, so that what a slot sees is one run of memory.

A rule parts image slots into blocks that see only each other (layout/render.py). Each block has a
run of places, text first, then its slots, and those that more slots see come first: given frames,
then decoded ones in their order. What a decoded slot sees is then the run's beginning up to itself,
so a step reads a view: it gathers nothing and masks nothing but padded text.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megavideo.layout.render import blocks
from megavideo.layout.rules import Rule


@dataclass(frozen=True, eq=False)
class Places:
    """Places of a cache; int64 arrays over image slots.

    Attributes:
        size: places in all.
        runs: first place of each run, where its copy of the text starts.
        begin: [V], first place that the slot sees: that of its run.
        place: [V], where the slot's own key is kept; -1 if no decoded slot ever sees it.
        end: [V], the slot sees places begin <= place < end.
    """

    size: int
    runs: tuple[int, ...]
    begin: np.ndarray
    place: np.ndarray
    end: np.ndarray

    @property
    def longest(self) -> int:
        """Most places that a slot sees."""
        return int((self.end - self.begin).max())


@lru_cache(maxsize=64)
def places(rule: Rule, text: int) -> Places:
    """Places of a channel with this rule and `text` text slots.

    Where a block is a frame, all frames share one run: one at a time is decoded, and a finished one
    is never looked at again.
    """
    slots = rule.frames * rule.side * rule.side
    begin, place, end = (np.full(slots, -1) for _ in range(3))
    start = 0
    runs = []
    for block in blocks(rule):
        first = 0 if rule.own_frame else start
        order = np.argsort(-block.visible.sum(axis=0), kind="stable")
        own, visible = block.slots[order], block.visible[np.ix_(order, order)]
        sees = visible.sum(axis=1)
        assert (visible == (np.arange(len(own)) < sees[:, None])).all(), "no beginning of a run"
        begin[own] = first
        place[own] = first + text + np.arange(len(own))
        end[own] = first + text + sees
        runs.append(first)
        start = first + text + len(own)
    return Places(start, tuple(sorted(set(runs))), begin, place, end)
