"""The order: every epoch a permutation, every layout the same batches, resuming a shift."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megavideo.data.order import Order, below, micro_step_positions, permutation

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)  # samples a shard


def order_of(sizes: list[int], seed: int = 0, window: int = 3) -> Order:
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    return Order(shard_of, np.arange(len(shard_of)), seed, window)


def epoch_of(order: Order, epoch: int) -> list[int]:
    start = epoch * len(order)
    return [order[position].sample for position in range(start, start + len(order))]


@given(sizes=SIZES, seed=st.integers(0, 2**63), window=st.integers(1, 15), epoch=st.integers(0, 9))
def test_every_epoch_visits_every_sample_once(
    sizes: list[int], seed: int, window: int, epoch: int
) -> None:
    assert sorted(epoch_of(order_of(sizes, seed, window), epoch)) == list(range(sum(sizes)))


@given(sizes=SIZES, window=st.integers(1, 15))
def test_a_window_holds_the_samples_of_its_shards_alone(sizes: list[int], window: int) -> None:
    order = order_of(sizes, window=window)
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    shards = shard_of[epoch_of(order, 0)].tolist()
    first_seen = list(dict.fromkeys(shards))
    for start in range(0, len(first_seen), window):
        together = set(first_seen[start : start + window])
        places = [place for place, shard in enumerate(shards) if shard in together]
        assert places == list(range(places[0], places[0] + len(places)))


@given(sizes=SIZES, position=st.integers(0, 200))
def test_a_place_depends_on_the_position_alone(sizes: list[int], position: int) -> None:
    asked_before = order_of(sizes)
    for other in (0, 150, position + 1):
        asked_before[other]
    assert asked_before[position] == order_of(sizes)[position]
    assert asked_before[position].epoch == position // sum(sizes)


def test_epochs_and_seeds_differ() -> None:
    order = order_of([10] * 8)
    assert epoch_of(order, 0) != epoch_of(order, 1)
    assert epoch_of(order, 0) != epoch_of(order_of([10] * 8, seed=1), 0)


def test_the_order_never_changes_between_versions() -> None:
    """Runs in progress depend on these numbers; change ORDER_VERSION with them."""
    assert permutation(1234, 0, 2, 3, 8).tolist() == [2, 3, 1, 7, 4, 0, 5, 6]
    assert epoch_of(order_of([2, 3, 2], seed=7, window=2), 1) == [2, 4, 5, 6, 3, 0, 1]


@given(
    consumed=st.integers(0, 100),
    layouts=st.tuples(*[st.tuples(st.integers(1, 6), st.integers(1, 4))] * 2),
)
def test_any_layout_takes_the_same_global_batches(
    consumed: int, layouts: tuple[tuple[int, int], tuple[int, int]]
) -> None:
    batch = int(np.lcm(*(micro_batch * ranks for micro_batch, ranks in layouts)))
    for micro_batch, ranks in layouts:
        taken = [
            position
            for step in range(batch // (micro_batch * ranks))
            for rank in range(ranks)
            for position in micro_step_positions(consumed, step, micro_batch, rank, ranks)
        ]
        assert taken == list(range(consumed, consumed + batch))


@given(
    micro_batch=st.integers(1, 6), ranks=st.integers(1, 4), done=st.integers(0, 9),
    rank=st.integers(0, 3),
)  # fmt: skip
def test_resuming_is_a_shift(micro_batch: int, ranks: int, done: int, rank: int) -> None:
    rank %= ranks
    resumed = micro_step_positions(done * micro_batch * ranks, 2, micro_batch, rank, ranks)
    assert resumed == micro_step_positions(0, done + 2, micro_batch, rank, ranks)


def test_substitutes_are_samples_and_differ_by_position_and_attempt() -> None:
    order = order_of([50] * 4)
    chosen = [order.substitute(17, attempt) for attempt in range(1, 9)]
    assert chosen == [order_of([50] * 4).substitute(17, attempt) for attempt in range(1, 9)]
    assert len({order.substitute(position, 1) for position in range(30)}) > 20
    assert len(set(chosen)) > 4 and all(0 <= sample < 200 for sample in chosen)


def test_left_out_samples_are_never_visited() -> None:
    shard_of = np.array([0, 0, 2, 2, 2, 5])
    order = Order(shard_of, np.array([3, 9, 14, 15, 20, 41]), 0, 2)
    assert sorted(epoch_of(order, 3)) == [3, 9, 14, 15, 20, 41]
    assert set(order.shards_near(0)) <= {0, 2, 5}


def test_the_shards_of_this_window_and_the_next_are_announced() -> None:
    order = order_of([4] * 6, window=2)
    first_six = {order[position].sample // 4 for position in range(16)}
    assert set(order.shards_near(0)) == set(order.shards_near(7)) == first_six
    assert len(order.shards_near(23)) == 2


@given(bound=st.integers(1, 10**9), raw=st.integers(0, 2**64 - 1))
def test_scaled_draws_stay_below_the_bound(bound: int, raw: int) -> None:
    assert 0 <= below(bound, raw) < bound


def test_no_sample_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sample"):
        order_of([])
