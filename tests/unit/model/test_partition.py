"""Layers are spread over pipeline stages by their work."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavideo.config.schema import ParallelConfig
from megavideo.model.partition import (
    _balanced,
    describe_stages,
    ideal_bubble,
    layer_costs,
    partition,
)
from tests.unit.model.test_model import config


@given(costs=st.lists(st.integers(0, 9), min_size=4, max_size=10), parts=st.integers(1, 5))
def test_no_other_cut_has_a_smaller_largest_part(costs: list[int], parts: int) -> None:
    parts = min(parts, len(costs) - 2)
    counts = _balanced(costs, parts)
    assert len(counts) == parts
    assert sum(counts) == len(costs)
    inner = range(2, len(costs) - 1)  # every part has a layer that is neither first nor last

    def largest(ends: tuple[int, ...]) -> int:
        bounds = (0, *ends, len(costs))
        return max(sum(costs[a:b]) for a, b in pairwise(bounds))

    ours = tuple(sum(counts[: part + 1]) for part in range(parts - 1))
    assert set(ours) <= set(inner)
    assert largest(ours) == min(largest(ends) for ends in combinations(inner, parts - 1))


@given(blocks=st.integers(2, 20), parts=st.integers(1, 8))
def test_equal_blocks_are_spread_evenly_also_below_the_largest(blocks: int, parts: int) -> None:
    first, *inner = _balanced([0, *[5] * blocks, 0], min(parts, blocks))
    held = [first - 1, *inner]
    held[-1] -= 1
    assert max(held) - min(held) <= 1


def test_the_published_model_is_cut_by_work_and_not_by_parameters() -> None:
    full = config("cogvideo-9b", "stage1")
    runs = partition(full.model, full.recipe, ParallelConfig(pp=4))
    assert [len(run) for run in runs] == [13, 12, 12, 13]
    lines = describe_stages(full.model, full.recipe, ParallelConfig(pp=4))
    assert lines[0] == "stage 0: embedding, layers 0-11 (24.9% of the work)"
    assert lines[3] == "stage 3: layers 36-47, head (25.3% of the work)"


def test_recomputation_makes_blocks_heavier_and_moves_the_cut() -> None:
    full = config("cogvideo-9b", "stage1")
    costs = {how: layer_costs(full.model, full.recipe, how) for how in ("none", "layer")}
    assert costs["layer"][0] == costs["none"][0] == 0
    assert costs["layer"][-1] == costs["none"][-1], "the head keeps what it needs"
    assert costs["layer"][7] / costs["none"][7] == pytest.approx(1.44, abs=0.01)


def test_virtual_stages_go_round_the_ranks() -> None:
    full = config("cogvideo-9b", "stage1")
    parallel = ParallelConfig(pp=2, virtual_stages=2)
    lines = describe_stages(full.model, full.recipe, parallel)
    assert lines[0].startswith("stage 0: embedding, layers 0-11; layers 24-35 (")
    assert lines[1].startswith("stage 1: layers 12-23; layers 36-47, head (")
    chosen = ParallelConfig(pp=2, virtual_stages=2, partition=(2, 1, 40, 7))
    lines = describe_stages(full.model, full.recipe, chosen)
    assert lines[0].startswith("stage 0: embedding, layer 0; layers 2-41 (")


def test_more_micro_batches_and_virtual_stages_make_the_bubble_smaller() -> None:
    assert ideal_bubble(ParallelConfig(pp=4), 12) == pytest.approx(3 / 15)
    assert ideal_bubble(ParallelConfig(pp=4, virtual_stages=3), 12) == pytest.approx(3 / 39)
    assert ideal_bubble(ParallelConfig(), 1) == 0
