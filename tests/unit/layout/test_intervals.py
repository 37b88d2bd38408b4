"""Intervals say what rules say, place by place and tile by tile."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from megavideo.layout.grid import Grid
from megavideo.layout.intervals import TILE, Intervals, intervals
from megavideo.layout.render import dense_mask, visible_pairs
from megavideo.layout.rules import Rule, spatial_rule, temporal_rule

GRIDS = [
    Grid(64, frames=5, side=20),
    Grid(24, frames=5, side=8),
    Grid(9, frames=3, side=7),
    Grid(8, frames=1, side=20),
    Grid(3, frames=4, side=1),
]


def rules_of(grid: Grid) -> list[Rule]:
    rules = []
    for stage in ("keyframes", "interpolation"):
        rules.append(spatial_rule(grid, stage))
        for window in (0, (grid.side + 1) // 2, 3):
            rules += [temporal_rule(grid, stage, window, layer) for layer in (0, 1)]
    return sorted(set(rules), key=str)


CASES = [pytest.param(rule, id=str(rule)) for grid in GRIDS for rule in rules_of(grid)]


def visible_places(layout: Intervals) -> np.ndarray:
    """bool [N, N], padding included."""
    place = np.arange(len(layout.slots))
    return (layout.begin[:, None] <= place) & (place < layout.end[:, None])


def mask_by_slots(layout: Intervals) -> np.ndarray:
    """bool [V, V], what the arrays say."""
    visible = visible_places(layout)
    real = layout.slots >= 0
    order = np.argsort(layout.slots[real])
    return visible[real][:, real][order][:, order]


@pytest.mark.parametrize("rule", CASES)
def test_intervals_are_the_rule(rule):
    layout = intervals(rule)
    assert np.array_equal(mask_by_slots(layout), dense_mask(rule))
    real = layout.slots[layout.slots >= 0]
    assert np.array_equal(np.sort(real), np.arange(rule.frames * rule.side**2))


@pytest.mark.parametrize("rule", CASES)
def test_no_query_sees_padding(rule):
    layout = intervals(rule)
    assert len(layout.slots) % TILE == 0
    assert not visible_places(layout)[:, layout.slots < 0].any()


@pytest.mark.parametrize("rule", CASES)
def test_tile_lists_visit_every_visible_pair_and_no_empty_tile(rule):
    layout = intervals(rule)
    real = (layout.slots >= 0)[:, None] & visible_places(layout)
    tiles = len(layout.slots) // TILE
    sees = real.reshape(tiles, TILE, tiles, TILE).any((1, 3))
    tile = np.arange(tiles)
    by_query = (layout.bounds[:, :1] // TILE <= tile) & (tile * TILE < layout.bounds[:, 1:2])
    by_key = (layout.seen_by[:, :1] <= tile) & (tile < layout.seen_by[:, 1:])
    assert np.array_equal(by_query, sees)
    assert np.array_equal(by_key, sees.T)


@pytest.mark.parametrize("rule", CASES)
def test_bounds_tell_tiles_that_need_no_mask(rule):
    layout = intervals(rule)
    place = np.arange(len(layout.slots))
    by_all = visible_places(layout).reshape(-1, TILE, len(place)).all(1)
    inside = (layout.bounds[:, 2:3] <= place) & (place < layout.bounds[:, 3:])
    assert np.array_equal(by_all, inside)


@pytest.mark.parametrize("rule", CASES)
def test_interval_lengths_count_the_useful_work(rule):
    layout = intervals(rule)
    lengths = (layout.end - layout.begin)[layout.slots >= 0]
    assert lengths.sum() == visible_pairs(rule)


@given(
    frames=st.integers(1, 5),
    side=st.integers(1, 9),
    own_frame=st.booleans(),
    window=st.integers(0, 10),
    shift=st.integers(0, 9),
    two_way=st.booleans(),
)
def test_any_rule_that_can_be_written_has_intervals(
    frames: int, side: int, own_frame: bool, window: int, shift: int, two_way: bool
) -> None:
    rule = Rule(frames, side, own_frame, window, shift % window if window else 0, two_way)
    assert np.array_equal(mask_by_slots(intervals(rule)), dense_mask(rule))


def test_arrays_are_small_int32_and_built_once():
    rule = temporal_rule(Grid(64, 5, 20), "keyframes", window=10, layer=1)
    layout = intervals(rule)
    assert intervals(rule) is layout
    arrays = (layout.slots, layout.begin, layout.end, layout.bounds, layout.seen_by)
    assert all(array.dtype == np.int32 and array.flags["C_CONTIGUOUS"] for array in arrays)
    assert len(layout.slots) == 2048  # 4 blocks of 125, 4 of 250 and 1 of 500 slots, in tiles
