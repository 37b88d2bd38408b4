"""What each pipeline rank does, in order, and when: 1F1B, and interleaved 1F1B over virtual stages.

F is the forward pass of one micro-batch through one run of layers, B its backward pass. Run k of
`pp * virtual_stages` lies on rank k % pp. (Narayanan et al. 2021, section 2.2; the interleaved
order is that of torch.distributed.pipelining.)
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Action:
    """F or B of micro-batch `micro_batch` through run `run`."""

    forward: bool
    run: int
    micro_batch: int


@dataclass(frozen=True)
class Bar:
    """An action of a rank, from `start` to `end` seconds after the step's begin."""

    rank: int
    action: Action
    start: float
    end: float


@lru_cache(maxsize=512)
def orders(pp: int, virtual_stages: int, micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """The actions of each rank."""
    return tuple(_order(rank, pp, virtual_stages, micro_batches) for rank in range(pp))


def _order(rank: int, pp: int, chunks: int, micro_batches: int) -> tuple[Action, ...]:
    """Warm-up forwards, then one backward a forward, then what is left."""
    total = micro_batches * chunks
    if chunks == 1:
        warm_up, a_round = min(pp - 1 - rank, total), micro_batches
    else:
        a_round = micro_batches // max(1, micro_batches // pp)
        warm_up = min((chunks - 1) * a_round + 2 * (pp - 1 - rank), total)

    def action(forward: bool, index: int) -> Action:
        chunk = index // a_round % chunks
        number = index // (a_round * chunks) * a_round + index % a_round
        return Action(forward, (chunk if forward else chunks - 1 - chunk) * pp + rank, number)

    actions = [action(True, index) for index in range(warm_up)]
    for index in range(total - warm_up):
        actions += [action(True, warm_up + index), action(False, index)]
    actions += [action(False, index) for index in range(total - warm_up, total)]
    return tuple(actions)


@lru_cache(maxsize=512)
def in_flight(pp: int, virtual_stages: int, micro_batches: int) -> tuple[frozenset[Counts], ...]:
    """Of each rank, how many forward passes through each of its runs wait for their backward pass,
    whenever they are about to become fewer.
    """
    found = []
    for order in orders(pp, virtual_stages, micro_batches):
        counts, moments = [0] * virtual_stages, set()
        for action, following in pairwise(order):
            counts[action.run // pp] += 1 if action.forward else -1
            if action.forward and not following.forward:
                moments.add(tuple(counts))
        found.append(frozenset(moments))
    return tuple(found)


def most_in_flight(moments: Iterable[Counts], kept: Sequence[int]) -> int:
    """The most bytes that a rank keeps at once, where its k-th run's forward keeps `kept[k]`."""
    return max(
        sum(count * size for count, size in zip(moment, kept, strict=True)) for moment in moments
    )


def short_of(pp: int, micro_batches: int) -> int:
    """A number of micro-batches that shows all of a schedule: it repeats itself in the middle."""
    many = 6 * pp
    return many if micro_batches > many and micro_batches % pp == 0 else micro_batches


def pipeline_seconds(
    pp: int,
    micro_batches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float,
) -> float:
    """Length of `timeline`, of which many equal rounds of micro-batches are not gone through."""
    if pp == 1:
        return micro_batches * (forward_s[0] + backward_s[0])

    def length(count: int) -> float:
        bars = timeline(pp, count, forward_s, backward_s, send_s)
        return max(bar.end for bar in bars)

    few = short_of(pp, micro_batches)
    if few == micro_batches:
        return length(micro_batches)
    per_micro_batch = (length(few) - length(few - pp)) / pp
    return length(few) + (micro_batches - few) * per_micro_batch


def ideal_seconds(
    pp: int,
    micro_batches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float,
) -> float:
    """What `pipeline_seconds` would be if the busiest rank waited for filling and draining only."""
    sends = 2 * send_s if len(forward_s) == pp > 1 else 0.0
    runs = [f + b + sends for f, b in zip(forward_s, backward_s, strict=True)]
    busiest = max(sum(runs[rank::pp]) for rank in range(pp))
    return micro_batches * busiest + (pp - 1) * sum(runs) / len(runs)


def timeline(
    pp: int,
    micro_batches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float,
) -> list[Bar]:
    """When each action runs: as soon as its rank is free and what it needs has arrived.

    Args:
        forward_s, backward_s: of each run.
        send_s: from a run's end until the next rank has its states (or gradients). DeepSpeed's own
            schedule waits for it (blocking sends); the interleaved one goes on meanwhile.
    """
    runs = len(forward_s)
    waiting = [deque(order) for order in orders(pp, runs // pp, micro_batches)]
    free = [0.0] * pp
    done: dict[Action, float] = {}
    bars: list[Bar] = []
    while any(waiting):
        before = len(bars)
        for rank, queue in enumerate(waiting):
            while queue and (ready := _ready(queue[0], runs, done)) is not None:
                action = queue.popleft()
                start = max(free[rank], ready)
                seconds = (forward_s if action.forward else backward_s)[action.run]
                bars.append(Bar(rank, action, start, start + seconds))
                last = action.run == (runs - 1 if action.forward else 0)
                done[action] = start + seconds + (0.0 if last else send_s)
                free[rank] = done[action] if runs == pp else start + seconds
        assert len(bars) > before, "the order of actions waits for itself"
    return bars


def _ready(action: Action, runs: int, done: dict[Action, float]) -> float | None:
    """When what `action` needs is there; None if it is not known yet."""
    run, number = action.run, action.micro_batch
    if action.forward:
        return 0.0 if run == 0 else done.get(Action(True, run - 1, number))
    if run == runs - 1:
        return done.get(Action(True, run, number))
    return done.get(Action(False, run + 1, number))
