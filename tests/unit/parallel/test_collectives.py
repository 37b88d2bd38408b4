"""Collectives that autograd sees: values and gradients equal those of one process."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megavideo.parallel.collectives import (
    copy_to_ranks,
    cut_slots,
    gather_slots,
    scatter_sum,
    sum_over_ranks,
)
from megavideo.parallel.linear import embed, first_rows
from megavideo.parallel.loss import cross_entropy
from megavideo.parallel.mesh import Axis, Mesh
from megavideo.parallel.random import distinct_randomness, distinct_seed
from megavideo.parallel.shard import Shard, cut
from tests.world import run_world

SIZE = 3


def drawn(seed: int, *shape: int) -> Tensor:
    """The same numbers wherever they are drawn, in float64 so that sums agree closely."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_collectives_give_the_values_and_gradients_of_one_process() -> None:
    run_world(_on_three_ranks, SIZE)


def _on_three_ranks(rank: int) -> None:
    axis = Mesh.build(pp=1, tp=SIZE).tp
    for check in (
        _check_copy_and_sum,
        _check_slots,
        _check_what_needs_no_gradient,
        _check_cut,
        _check_embedding,
        _check_first_rows,
        _check_cross_entropy,
        _check_randomness,
    ):
        check(axis)


def gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def _check_copy_and_sum(axis: Axis) -> None:
    """What every rank holds goes in, is weighted differently on each rank, and is summed up."""
    x, y = drawn(0, 2, 3).requires_grad_(), drawn(1, 5).requires_grad_()
    weights = [(drawn(10 + r, 2, 3), drawn(20 + r, 5)) for r in range(SIZE)]
    goal = drawn(2, 2, 3), drawn(3, 5)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return (a * goal[0]).sin().sum() + (b * goal[1]).sin().sum()

    whole = loss(x * sum(w[0] for w in weights), y * sum(w[1] for w in weights))
    expected = gradients(whole, [x, y])
    a, b = copy_to_ranks([x, y], axis)
    mine = weights[axis.rank]
    ours = loss(*sum_over_ranks([a * mine[0], b * mine[1]], axis))
    torch.testing.assert_close(ours, whole)
    torch.testing.assert_close(gradients(ours, [x, y]), expected)


def _check_slots(axis: Axis) -> None:
    """Runs of slots are gathered, weighted, summed and cut again; a parameter rides along."""
    text, image = drawn(0, 2, SIZE, 4), drawn(1, 2, 2 * SIZE, 4)
    parameter = drawn(2, 4).requires_grad_()
    weights = [drawn(10 + r, 4) for r in range(SIZE)]
    whole = [stream.clone().requires_grad_() for stream in (text, image)]
    out = [(x * parameter * sum(weights)).sin() for x in whole]
    loss = sum((o * o).sum() for o in out)
    expected = gradients(loss, [*whole, parameter])
    mine = [cut(s, Shard(1), axis.rank, SIZE).clone().requires_grad_() for s in (text, image)]
    streams, (copied,) = gather_slots(mine, [parameter], axis)
    assert torch.equal(streams[0], text) and torch.equal(streams[1], image)
    partial = [x * copied * weights[axis.rank] for x in streams]
    ours = sum((o * o).sum() for o in (p.sin() for p in scatter_sum(partial, axis)))
    found = gradients(ours, [*mine, parameter])
    for gradient, wanted in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(gradient, cut(wanted, Shard(1), axis.rank, SIZE))
    torch.testing.assert_close(found[2], expected[2], msg="a whole gradient on every rank")


def _check_what_needs_no_gradient(axis: Axis) -> None:
    """Frozen text stays without a gradient when it travels with images that need one."""
    text, image = drawn(0, 2, SIZE, 4), drawn(1, 2, SIZE, 4).requires_grad_()
    functions: list[Callable[[], Sequence[Tensor]]] = [
        lambda: copy_to_ranks([text, image], axis),
        lambda: sum_over_ranks([text, image], axis),
        lambda: gather_slots([text, image], [], axis)[0],
        lambda: scatter_sum([text, image], axis),
    ]
    for function in functions:
        assert [t.requires_grad for t in function()] == [False, True]
        with torch.no_grad():
            assert not any(t.requires_grad for t in function())


def _check_cut(axis: Axis) -> None:
    whole = drawn(0, 1, 2 * SIZE, 3).requires_grad_()
    goal = drawn(1, 1, 2 * SIZE, 3)
    expected = gradients((whole * goal).sin().sum(), [whole])
    mine = cut_slots(whole, axis)
    ours = (mine * cut(goal, Shard(1), axis.rank, SIZE)).sin().sum()
    torch.testing.assert_close(gradients(ours, [whole]), expected)


def _check_embedding(axis: Axis) -> None:
    """Seven rows on three ranks: 3, 3 and 1 with padding."""
    table, ids = drawn(0, 7, 2), torch.tensor([[0, 6, 3], [2, 3, 5]])
    mine = torch.zeros(3, 2, dtype=torch.float64)
    held = cut(table, Shard(0, padded=True), axis.rank, SIZE)
    mine[: len(held)] = held
    mine.requires_grad_()
    (states,) = sum_over_ranks([embed(ids, mine, axis)], axis)
    assert torch.equal(states.detach(), table[ids])
    goal = drawn(1, 2, 3, 2)
    whole = table.requires_grad_()
    (expected,) = gradients((whole[ids] * goal).sum(), [whole])
    (found,) = gradients((states * goal).sum(), [mine])
    wanted = cut(expected, Shard(0, padded=True), axis.rank, SIZE)
    torch.testing.assert_close(found[: len(held)], wanted)
    assert not found[len(held) :].any()


def _check_first_rows(axis: Axis) -> None:
    """The first four of seven rows lie on two ranks; cut by themselves they are 2, 2 and 0."""
    table, shard = drawn(0, 7, 2), Shard(0, padded=True)
    held = cut(table, shard, axis.rank, SIZE)
    mine = torch.cat([held, torch.zeros(3 - len(held), 2, dtype=torch.float64)]).requires_grad_()
    rows = first_rows(mine, 4, axis)
    assert torch.equal(rows.detach(), cut(table[:4], shard, axis.rank, SIZE))
    goal = drawn(1, 4, 2)
    (found,) = gradients((rows * cut(goal, shard, axis.rank, SIZE)).sum() + 0 * mine.sum(), [mine])
    placed = torch.cat([goal, torch.zeros(5, 2, dtype=torch.float64)])
    assert torch.equal(found, placed[3 * axis.rank : 3 * axis.rank + 3])


def _check_cross_entropy(axis: Axis) -> None:
    """Seven columns on three ranks: the last has one, and two that are no columns."""
    logits, labels = 5 * drawn(0, 6, 7), torch.tensor([0, 1, 2, 4, 5, 6])
    whole = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(whole, labels, reduction="none")
    weights = drawn(1, 6)
    (gradient,) = gradients((expected * weights).sum(), [whole])
    padded = torch.cat([logits, torch.full((6, 2), -torch.inf, dtype=torch.float64)], 1)
    mine = cut(padded, Shard(1), axis.rank, SIZE).clone().requires_grad_()
    ours = cross_entropy(mine, labels, axis)
    torch.testing.assert_close(ours, expected)
    (found,) = gradients((ours * weights).sum(), [mine])
    padding = torch.zeros(6, 2, dtype=torch.float64)
    wanted = cut(torch.cat([gradient, padding], 1), Shard(1), axis.rank, SIZE)
    torch.testing.assert_close(found, wanted)


def _check_randomness(axis: Axis) -> None:
    """Other numbers on each rank inside, the same outside, and the same again when repeated."""
    torch.manual_seed(7)
    state = torch.get_rng_state()

    def draw() -> list[float]:
        with distinct_randomness(axis):
            inside = torch.rand(()).item()
        return [inside, distinct_seed(axis).item(), torch.rand(()).item()]

    drawn_here = draw()
    everyone = axis.exchange(drawn_here)
    for number, alike in enumerate((False, False, True)):
        values = {drawn[number] for drawn in everyone}
        assert len(values) == (1 if alike else SIZE)
    torch.set_rng_state(state)
    assert draw() == drawn_here
