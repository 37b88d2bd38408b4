"""Neighbourhood attention as compiled, on a GPU: all that the emulator was asked."""

import pytest
import torch

from megavideo.ops import library
from tests.kernels.test_neighbourhood import CASES, PUBLISHED, Case, check, run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [*CASES, *PUBLISHED], ids=str)
def test_kernels_compute_the_softmax_and_its_gradients(case: Case) -> None:
    check(case, run(case, library.load(), "cuda"))


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_ten_runs_give_the_same_bits(case: Case) -> None:
    first = run(case, library.load(), "cuda")
    for _ in range(9):
        again = run(case, library.load(), "cuda")
        assert all(torch.equal(first[name], again[name]) for name in first)
