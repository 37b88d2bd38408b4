"""Rules rendered into what programs use: a dense mask, and blocks of slots that see each other."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megavideo.layout.rules import Rule


@dataclass(frozen=True, eq=False)
class Block:
    """Slots that see only each other (int64 [n], rising), and which sees which (bool [n, n])."""

    slots: np.ndarray
    visible: np.ndarray


@lru_cache(maxsize=64)
def blocks(rule: Rule) -> tuple[Block, ...]:
    """The blocks of `rule`, which partition its image slots."""
    slots = np.arange(rule.frames * rule.side * rule.side)
    numbers = rule.block(slots)
    groups = [slots[numbers == number] for number in np.unique(numbers)]
    return tuple(Block(group, rule(group[:, None], group[None, :])) for group in groups)


def dense_mask(rule: Rule) -> np.ndarray:
    """bool [V, V]: entry (q, k) says whether q sees k."""
    slots = np.arange(rule.frames * rule.side * rule.side)
    return rule(slots[:, None], slots[None, :])


@lru_cache(maxsize=64)
def visible_pairs(rule: Rule) -> int:
    """Number of (query, key) pairs of image slots: the useful work of one head."""
    return sum(int(block.visible.sum()) for block in blocks(rule))
