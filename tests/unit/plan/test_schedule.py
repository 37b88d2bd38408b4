"""Pipeline schedules: complete, as short as they should be, and no more in flight than needed."""

import pytest

from megavideo.plan.schedule import (
    ideal_seconds,
    in_flight,
    most_in_flight,
    orders,
    pipeline_seconds,
    timeline,
)

CASES = [(1, 1, 4), (4, 1, 2), (4, 1, 8), (3, 2, 6), (4, 3, 8), (2, 2, 3)]


@pytest.mark.parametrize(("pp", "chunks", "micro_batches"), CASES)
def test_every_rank_does_each_of_its_passes_once(pp: int, chunks: int, micro_batches: int) -> None:
    for rank, order in enumerate(orders(pp, chunks, micro_batches)):
        assert len(set(order)) == len(order) == 2 * chunks * micro_batches
        assert {action.run for action in order} == {c * pp + rank for c in range(chunks)}
        assert {action.micro_batch for action in order} == set(range(micro_batches))


@pytest.mark.parametrize(("pp", "chunks", "micro_batches"), CASES)
def test_no_pass_starts_before_what_it_needs(pp: int, chunks: int, micro_batches: int) -> None:
    runs = pp * chunks
    bars = timeline(pp, micro_batches, [1.0] * runs, [2.0] * runs, 0.25)
    end = {bar.action: bar.end for bar in bars}
    start = {bar.action: bar.start for bar in bars}
    assert len(bars) == 2 * runs * micro_batches
    for action, begin in start.items():
        number = action.micro_batch
        for other in start:
            if other.micro_batch == number and other.forward and not action.forward:
                assert other.run != action.run or end[other] <= begin
            follows = other.run - action.run == (-1 if action.forward else 1)
            if other.micro_batch == number and other.forward == action.forward and follows:
                assert end[other] + 0.25 <= begin


def test_even_stages_wait_for_filling_and_draining_only() -> None:
    """(P - 1) / m of a 1F1B step, a v-th of it when interleaved (Narayanan et al. 2021, 2.2)."""
    assert pipeline_seconds(4, 8, [1.0] * 4, [2.0] * 4, 0.0) == 8 * 3 + 3 * 3
    assert pipeline_seconds(4, 8, [0.5] * 8, [1.0] * 8, 0.0) == 8 * 3 + 3 * 3 / 2
    assert ideal_seconds(4, 8, [0.5] * 8, [1.0] * 8, 0.0) == 8 * 3 + 3 * 3 / 2


@pytest.mark.parametrize(("chunks", "micro_batches"), [(1, 64), (2, 64), (1, 65)])
def test_a_long_schedule_need_not_be_gone_through(chunks: int, micro_batches: int) -> None:
    forward = [1.0 + 0.1 * run for run in range(4 * chunks)]
    backward = [2.0] * (4 * chunks)
    bars = timeline(4, micro_batches, forward, backward, 0.05)
    whole = max(bar.end for bar in bars)
    assert pipeline_seconds(4, micro_batches, forward, backward, 0.05) == pytest.approx(
        whole, rel=2e-3
    )


def test_the_first_rank_keeps_most_and_virtual_stages_keep_more() -> None:
    plain = in_flight(4, 1, 16)
    assert [most_in_flight(moments, [12]) for moments in plain] == [48, 36, 24, 12]
    interleaved = most_in_flight(in_flight(4, 2, 16)[0], [6, 6])
    assert interleaved == (4 + 2 * 3 + 1) * 6 > 48
