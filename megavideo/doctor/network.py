"""Measured between processes: all-reduce by link class, each link of a ring, and clocks."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavideo.doctor.facts import Facts
from megavideo.doctor.verdict import Level, Verdict, listed

# Large enough for the rate of large messages, small enough for a second on a slow link.
MESSAGE_BYTES = {"cuda": 256 * 2**20, "cpu": 8 * 2**20}
REPEATS = 3
PINGS = 5
# torchrun compares times of signs of life that other nodes wrote with its own clock; a node that
# seems silent for 15 s is dropped.
WARN_SKEW_S, FAIL_SKEW_S = 1.0, 10.0


@dataclass(frozen=True)
class Link:
    """A direct connection between two nodes, and how fast it carried a message."""

    source: str
    target: str
    gigabytes_per_s: float


def leaders(facts: Sequence[Facts]) -> list[Facts]:
    """The first process of each node, by rank."""
    return sorted((fact for fact in facts if fact.local_rank == 0), key=lambda fact: fact.rank)


def bandwidth(facts: Sequence[Facts], device: torch.device) -> list[Verdict]:
    """All-reduce within and between nodes; every rank must call it."""
    heads = leaders(facts)
    inside = _within(facts, heads, device)
    if len(heads) == 1:
        return [inside]
    ranks = [head.rank for head in heads]
    group = dist.new_group(ranks)
    rate = all_reduce_rate(group, device) if dist.get_rank() in ranks else 0.0
    rates = _gather(rate)
    text = f"{rates[heads[0].rank]:.3f} GB/s all-reduce over {len(heads)} nodes"
    links = ring(heads, group, device)
    return [inside, judge_links(text, links)]


def _within(facts: Sequence[Facts], heads: Sequence[Facts], device: torch.device) -> Verdict:
    members = [[fact.rank for fact in facts if fact.node == head.node] for head in heads]
    groups = [dist.new_group(ranks) for ranks in members]  # every rank takes part in making each
    own = next(place for place, ranks in enumerate(members) if dist.get_rank() in ranks)
    rates = _gather(all_reduce_rate(groups[own], device) if len(members[own]) > 1 else 0.0)
    return judge_within({head.node: rates[head.rank] for head in heads})


def judge_within(rates: dict[str, float]) -> Verdict:
    """The slowest node's rate, and whether it is far from the others'. A rate of 0: one process."""
    measured = {node: rate for node, rate in rates.items() if rate}
    if not measured:
        return Verdict("ok", "within a node", "one process on each node: nothing to measure")
    usual = statistics.median(measured.values())
    text = f"{min(measured.values()):.3f} GB/s all-reduce, the slowest of {len(measured)} node(s)"
    slow = [node for node, rate in measured.items() if rate < usual / 2]
    if slow:
        more = f"{listed(slow)} less than half the usual {usual:.3f}: look at PCIe, NVLink, load"
        return Verdict("warn", "within a node", f"{text}; {more}")
    return Verdict("ok", "within a node", text)


def judge_links(text: str, links: Sequence[Link]) -> Verdict:
    """`text`, and the links that are far slower than the others."""
    usual = statistics.median(link.gigabytes_per_s for link in links)
    slow = [link for link in links if link.gigabytes_per_s < usual / 2]
    if slow:
        named = ", ".join(f"{k.source} to {k.target} {k.gigabytes_per_s:.3f}" for k in slow[:4])
        more = f"slow: {named}, usual {usual:.3f}; look at cable, port and interface there"
        return Verdict("warn", "between nodes", f"{text}; {more}")
    least = min(link.gigabytes_per_s for link in links)
    return Verdict("ok", "between nodes", f"{text}; slowest link {least:.3f} GB/s")


def all_reduce_rate(group: dist.ProcessGroup | None, device: torch.device) -> float:
    """GB/s of an all-reduce, as nccl-tests' bus bandwidth: what each rank's link carries one way.

    2 (n - 1) / n times the message, in the median of a few repetitions after one to warm up.
    """
    message = _message(device)
    size = dist.get_world_size(group)
    seconds = [
        _timed(lambda: dist.all_reduce(message, group=group), device) for _ in range(1 + REPEATS)
    ]
    moved = 2 * (size - 1) / size * message.nbytes
    return moved / statistics.median(seconds[1:]) / 1e9


def ring(heads: Sequence[Facts], group: dist.ProcessGroup, device: torch.device) -> list[Link]:
    """Each node sends to the next, all at once; each times what it receives."""
    ranks = [head.rank for head in heads]
    rate = 0.0
    if dist.get_rank() in ranks:
        rate = _ring_rate(ranks, group, device)
    rates = _gather(rate)
    pairs = zip([heads[-1], *heads[:-1]], heads, strict=True)
    return [Link(source.node, target.node, rates[target.rank]) for source, target in pairs]


def _ring_rate(ranks: list[int], group: dist.ProcessGroup, device: torch.device) -> float:
    place, size = ranks.index(dist.get_rank()), len(ranks)
    outgoing, incoming = _message(device), _message(device)

    def exchange() -> None:
        operations = [
            dist.P2POp(dist.isend, outgoing, ranks[(place + 1) % size], group),
            dist.P2POp(dist.irecv, incoming, ranks[place - 1], group),
        ]
        sending, receiving = dist.batch_isend_irecv(operations)[:2]
        receiving.wait()
        received.append(time.perf_counter())
        sending.wait()

    received: list[float] = []
    seconds = []
    for _ in range(REPEATS):
        dist.barrier(group)
        started = time.perf_counter()
        _timed(exchange, device)
        seconds.append(received[-1] - started)
    return outgoing.nbytes / statistics.median(seconds) / 1e9


def _message(device: torch.device) -> Tensor:
    return torch.zeros(MESSAGE_BYTES[device.type] // 4, device=device)


def _timed(action: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    started = time.perf_counter()
    action()
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gather(value: float) -> list[float]:
    """Every rank's value, by rank."""
    values: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def clock_offsets(
    ranks: Sequence[int], device: torch.device, clock: Callable[[], float] = time.time
) -> dict[int, float]:
    """Seconds by which each rank's clock is ahead of the first one's; all of `ranks` must call it.

    As NTP does: the answer's time against the middle of question and answer, of the quickest of a
    few. Only the first rank gets the result, the others an empty dictionary.
    """
    first, *others = ranks
    if dist.get_rank() == first:
        return {rank: _offset(rank, device, clock) for rank in others}
    for _ in range(PINGS):
        dist.recv(torch.zeros(1, dtype=torch.float64, device=device), first)
        dist.send(torch.tensor([clock()], dtype=torch.float64, device=device), first)
    return {}


def _offset(rank: int, device: torch.device, clock: Callable[[], float]) -> float:
    answer = torch.zeros(1, dtype=torch.float64, device=device)
    measured = []
    for _ in range(PINGS):
        asked = clock()
        dist.send(torch.zeros_like(answer), rank)
        dist.recv(answer, rank)
        theirs, answered = answer.item(), clock()
        measured.append((answered - asked, theirs - (asked + answered) / 2))
    return min(measured)[1]


def judge_clocks(offsets: dict[str, float]) -> Verdict:
    """Clocks agree, or which node's does not."""
    if not offsets:
        return Verdict("ok", "clocks", "one node")
    node, offset = max(offsets.items(), key=lambda item: abs(item[1]))
    text = f"{node}'s is {offset:+.3f} s from the first node's, the most of {len(offsets) + 1}"
    if abs(offset) < WARN_SKEW_S:
        return Verdict("ok", "clocks", text)
    level: Level = "fail" if abs(offset) >= FAIL_SKEW_S else "warn"
    return Verdict(level, "clocks", f"{text}: torchrun takes it for dead at 15 s; run NTP there")
