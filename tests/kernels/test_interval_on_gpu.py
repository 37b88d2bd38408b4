"""Interval attention as compiled, on a GPU: all that the emulator was asked, and full size.

Also what to run under compute-sanitizer: `compute-sanitizer python -m pytest -m gpu tests/kernels`.
"""

import pytest
import torch

from megavideo.layout.grid import Grid
from megavideo.layout.rules import spatial_rule, temporal_rule
from megavideo.ops import interval, library
from tests.kernels.test_interval import CASES, Case, check, run

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


@pytest.mark.parametrize("case", [*CASES, *FULL], ids=str)
def test_kernels_compute_the_softmax_and_its_gradients(case: Case) -> None:
    check(case, run(case, library.load(), "cuda"))


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
