"""Rules rendered for the fused kernels: an order of image slots in which every query sees one run.

Places are positions in that order. Blocks of slots follow each other, each padded to whole tiles;
inside a block, keys that more queries see come first. Then what a query sees is an interval of
places, for every rule of the model: dense causal frames, shifted windows, and both interpolations
(given frames first, so that a causal frame sees all of them and its own past as one prefix).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megavideo.layout.render import Block, blocks
from megavideo.layout.rules import Rule

# Places per tile: keys that a kernel loads at once. Blocks start at tiles, so that a tile holds one
# block only; 100-slot frame windows times 5 frames waste 2.4 % on it.
TILE = 64


@dataclass(frozen=True, eq=False)
class Intervals:
    """All that a kernel knows of a rule; int32 arrays over N places, in tiles of `TILE`.

    Attributes:
        slots: [N], the image slot at each place; -1 where a block is padded.
        begin, end: [N], places that the query at each place sees are begin <= place < end. Padding
            repeats its block's last query, so that it never makes a tile look partly visible.
        bounds: [N/TILE, 4], over the queries of a tile: least begin, greatest end (a key outside is
            seen by none of them), greatest begin, least end (a key inside is seen by all).
        seen_by: [N/TILE, 2], query tiles first <= tile < last that see some key of a tile.
    """

    slots: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    bounds: np.ndarray
    seen_by: np.ndarray


@lru_cache(maxsize=64)
def intervals(rule: Rule) -> Intervals:
    """Places and intervals of `rule`."""
    parts = []
    start = 0
    for block in blocks(rule):
        parts.append(_place(block, start))
        start += parts[-1].shape[1]
    slots, begin, end = np.concatenate(parts, axis=1)
    bounds = _bounds(begin, end)
    return Intervals(slots, begin, end, bounds, _seen_by(bounds))


def _place(block: Block, start: int) -> np.ndarray:
    """int32 [3, n padded to tiles]: slots, begin, end of a block whose first place is `start`."""
    order = np.argsort(-block.visible.sum(axis=0), kind="stable")
    visible = block.visible[np.ix_(order, order)]
    begin = visible.argmax(axis=1)
    end = len(order) - visible[:, ::-1].argmax(axis=1)
    assert (end - begin == visible.sum(axis=1)).all(), "the rule is not one interval per query"
    padding = (0, -len(order) % TILE)
    return np.stack(
        [
            np.pad(block.slots[order], padding, constant_values=-1),
            np.pad(start + begin, padding, mode="edge"),
            np.pad(start + end, padding, mode="edge"),
        ]
    ).astype(np.int32)


def _bounds(begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    begin, end = begin.reshape(-1, TILE), end.reshape(-1, TILE)
    return np.stack([begin.min(1), end.max(1), begin.max(1), end.min(1)], axis=1)


def _seen_by(bounds: np.ndarray) -> np.ndarray:
    first_key = TILE * np.arange(len(bounds))[:, None]
    sees = (bounds[:, 0] < first_key + TILE) & (bounds[:, 1] > first_key)
    return np.stack([sees.argmax(1), len(bounds) - sees[:, ::-1].argmax(1)], axis=1).astype(
        np.int32
    )
