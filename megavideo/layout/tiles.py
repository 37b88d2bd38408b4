"""How many (query, key) pairs programs compute for a rule, beside those that the rule shows.

A program works in tiles: it computes whole tiles of which it needs a part, and each in several
matrix products. A count here is products x pairs of one head and one sample; a product of one pair
is 2 x head size FLOPs. T text slots are keys of every image query.

    visible   the rule itself: S and O forward; dV, dP, dQ, dK backward; text's dK, dV if wanted
    library   the CUDA kernels: 64-key tiles that a warp's queries see; two passes backward compute
              S and dP twice (kernels/local_attention/README.md)
    atomic    the same with one pass backward
    flex      FlexAttention: 128 x 128 blocks, two passes backward
    blocks    SDPA and the plain reference: each block of slots whole, S once more backward
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from megavideo.layout.intervals import TILE, intervals
from megavideo.layout.render import blocks, dense_mask, visible_pairs
from megavideo.layout.rules import Rule

Attention = Literal["visible", "library", "atomic", "flex", "blocks"]

FLEX_BLOCK = 128


@dataclass(frozen=True)
class Products:
    """Products x pairs, forward and backward."""

    forward: int
    backward: int


@lru_cache(maxsize=256)
def attention_products(
    rule: Rule, text: int, how: Attention, head_size: int, text_gradient: bool
) -> Products:
    """Work of one head for one sample.

    Args:
        text: text slots, all of them real.
        how: the program (see above).
        text_gradient: whether text's keys and values need one.
    """
    if how == "visible":
        image, queries = visible_pairs(rule), rule.frames * rule.side**2
        backward = 4 * image + (4 if text_gradient else 2) * queries * text
        return Products(2 * (image + queries * text), backward)
    if how in ("library", "atomic"):
        return _library(rule, text, head_size, text_gradient, one_pass=how == "atomic")
    if how == "flex":
        pairs = _flex_pairs(rule, text)
        return Products(2 * pairs, 7 * pairs)
    pairs = sum(len(block.slots) * (text + len(block.slots)) for block in blocks(rule))
    return Products(2 * pairs, 5 * pairs)


def _library(
    rule: Rule, text: int, head_size: int, text_gradient: bool, one_pass: bool
) -> Products:
    """Forward a warp has 32 queries (16 with head size 128); backward 16 queries or 16 keys."""
    places = len(intervals(rule).slots)
    of_text = places * -(-text // TILE) * TILE
    forward = _pairs_by_queries(rule, 32 if head_size == 64 else 16) + of_text
    if one_pass:
        backward = 5 * _pairs_by_keys(rule, 16) + (5 if text_gradient else 3) * of_text
    else:
        by_keys = _pairs_by_keys(rule, 16) + of_text * text_gradient
        backward = 3 * (_pairs_by_queries(rule, 16) + of_text) + 4 * by_keys
    return Products(2 * forward, backward)


def _pairs_by_queries(rule: Rule, rows: int) -> int:
    """Queries of a warp x key tiles that any of them sees."""
    layout = intervals(rule)
    begin = layout.begin.reshape(-1, rows).min(1) // TILE
    end = -(-layout.end.reshape(-1, rows).max(1) // TILE)
    return int((end - begin).sum()) * rows * TILE


def _pairs_by_keys(rule: Rule, rows: int) -> int:
    """Keys of a warp x query tiles of which any sees one of them."""
    layout = intervals(rule)
    low, high = layout.bounds[:, 0], layout.bounds[:, 1]
    first = rows * np.arange(len(layout.slots) // rows)[:, None]
    return int(((low < first + rows) & (high > first)).sum()) * rows * TILE


def _flex_pairs(rule: Rule, text: int) -> int:
    """Pairs in blocks of queries x (text and image) keys that are not wholly hidden."""
    slots = rule.frames * rule.side**2
    padded = -(-slots // FLEX_BLOCK) * FLEX_BLOCK, -(-(text + slots) // FLEX_BLOCK) * FLEX_BLOCK
    visible = np.zeros(padded, dtype=bool)
    visible[:slots, :text] = True
    visible[:slots, text : text + slots] = dense_mask(rule)
    tiles = visible.reshape(padded[0] // FLEX_BLOCK, FLEX_BLOCK, -1, FLEX_BLOCK).any((1, 3))
    return int(tiles.sum()) * FLEX_BLOCK**2
