"""Interval attention as compiled, on a GPU: all that the emulator was asked, and full size.

Also what to run under compute-sanitizer: `compute-sanitizer python -m pytest -m gpu tests/kernels`.
"""

import pytest
import torch

from megavideo.layout.grid import Grid
from megavideo.layout.rules import spatial_rule, temporal_rule
from megavideo.ops import interval, library
from tests.kernels.test_interval import CASES, WAYS, Case, check, run

pytestmark = pytest.mark.gpu

PUBLISHED = Grid(text=64, frames=5, side=20)
FULL = [
    Case(rule, text=64, lengths=(64, 17), heads=2, dropout=dropout)
    for stage in ("keyframes", "interpolation")
    for rule in (
        spatial_rule(PUBLISHED, stage),
        temporal_rule(PUBLISHED, stage, 0, 0),
        temporal_rule(PUBLISHED, stage, 10, 0),
        temporal_rule(PUBLISHED, stage, 10, 1),
    )
    for dropout in (0.0, 0.1)
]


@WAYS
@pytest.mark.parametrize("case", [*CASES, *FULL], ids=str)
def test_kernels_compute_the_softmax_and_its_gradients(case: Case, atomic: bool) -> None:
    check(case, run(case, library.load(), "cuda", atomic))


@pytest.mark.parametrize("case", FULL[-2:], ids=str)
def test_ten_runs_give_the_same_bits(case: Case) -> None:
    first = run(case, library.load(), "cuda")
    for _ in range(9):
        again = run(case, library.load(), "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_kernels_run_in_a_cuda_graph() -> None:
    case = FULL[-1]
    given = [tensor.cuda() for tensor in case.inputs()]
    kernels = library.load()
    arguments = (kernels, *given, case.rule, 0.0, 0)
    expected, _ = interval.forward(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = interval.forward(*arguments)
    graph.replay()
    assert torch.equal(out, expected)


@WAYS
def test_backward_runs_in_a_cuda_graph_again_and_again(atomic: bool) -> None:
    case = FULL[-1]
    given, grad = [tensor.cuda() for tensor in case.inputs()], case.grad().cuda()
    kernels = library.load()
    out, lse = interval.forward(kernels, *given, case.rule, 0.0, 0)
    arguments = (kernels, grad, *given, out, lse, case.rule, 0.0, 0)
    expected = interval.backward(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = interval.backward(*arguments, atomic=atomic)
    for _ in range(3):  # Sums that are not cleared would grow.
        graph.replay()
    for value, other in zip(ours, expected, strict=True):
        assert value is not None and other is not None
        torch.testing.assert_close(value, other, rtol=0.03, atol=0.03)
