"""The masks: against the published definition written out in words, exhaustively on small grids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavideo.layout.grid import Grid
from megavideo.layout.render import blocks, dense_mask, visible_pairs
from megavideo.layout.rules import (
    Rule,
    decode_rule,
    encode_rule,
    loss_frames,
    spatial_rule,
    temporal_rule,
    text_visible,
)

PUBLISHED = Grid(text=64, frames=5, side=20)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    window = draw(st.integers(2, 4))
    side = window * draw(st.integers(1, 3))
    windowed, shifted = draw(st.booleans()), draw(st.booleans())
    return Rule(
        frames=draw(st.integers(1, 4)),
        side=side,
        own_frame=not windowed and draw(st.booleans()),
        window=window if windowed else 0,
        shift=window // 2 if windowed and shifted else 0,
        two_way=draw(st.booleans()),
    )


def published_visibility(rule: Rule, q: int, k: int) -> bool:
    """Section 4.1 of docs/model.md in plain Python: rolled tiles, their regions, and the order."""
    per_frame, side = rule.side**2, rule.side
    (qf, qp), (kf, kp) = divmod(q, per_frame), divmod(k, per_frame)
    if rule.own_frame and qf != kf:
        return False
    if rule.window and not all(
        _same_window(rule, a, b) for a, b in ((qp // side, kp // side), (qp % side, kp % side))
    ):
        return False
    earlier = kf < qf or (kf == qf and kp <= qp)
    if not rule.two_way:
        return earlier
    return kf % 2 == 0 or (qf % 2 == 1 and earlier)


def _same_window(rule: Rule, a: int, b: int) -> bool:
    rolled = [(x - rule.shift) % rule.side for x in (a, b)]
    tiles = [x // rule.window for x in rolled]
    regions = [x >= rule.side - rule.shift for x in rolled]
    return tiles[0] == tiles[1] and (not rule.shift or regions[0] == regions[1])


@given(rules())
def test_a_rule_equals_the_published_definition(rule: Rule) -> None:
    slots = range(rule.frames * rule.side**2)
    expected = np.array([[published_visibility(rule, q, k) for k in slots] for q in slots])
    assert (dense_mask(rule) == expected).all()


@given(rules())
def test_blocks_partition_the_slots_and_hold_all_that_is_visible(rule: Rule) -> None:
    mask = np.zeros_like(dense_mask(rule))
    for block in blocks(rule):
        mask[np.ix_(block.slots, block.slots)] = block.visible
    assert (mask == dense_mask(rule)).all()
    slots = np.concatenate([block.slots for block in blocks(rule)])
    assert (np.sort(slots) == np.arange(len(mask))).all()


@given(rules())
def test_a_rule_survives_its_string(rule: Rule) -> None:
    assert decode_rule(encode_rule(rule)) == rule


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [
        (spatial_rule(PUBLISHED, "keyframes"), 401_000),
        (spatial_rule(PUBLISHED, "interpolation"), 640_400),
        (temporal_rule(PUBLISHED, "keyframes", 0, 0), 2_001_000),
        (temporal_rule(PUBLISHED, "interpolation", 10, 0), 680_400),
        (temporal_rule(PUBLISHED, "interpolation", 10, 1), 382_900),
    ],
)
def test_full_size_rules_show_the_published_number_of_pairs(rule: Rule, pairs: int) -> None:
    assert visible_pairs(rule) == pairs


def test_every_image_slot_sees_itself() -> None:
    for stage in ("keyframes", "interpolation"):
        for rule in (spatial_rule(PUBLISHED, stage), temporal_rule(PUBLISHED, stage, 10, 1)):
            slots = np.arange(PUBLISHED.image_tokens)
            assert rule(slots, slots).all()


def test_text_is_padded_on_the_left() -> None:
    assert [bool(text_visible(slot, 2, 5)) for slot in range(5)] == [False] * 3 + [True] * 2


def test_given_frames_carry_no_loss() -> None:
    assert loss_frames("keyframes", 5) == (1, 2, 3, 4)
    assert loss_frames("interpolation", 5) == (1, 3)
    assert loss_frames("image", 1) == (0,)
