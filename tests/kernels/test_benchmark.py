"""The benchmark's own contender runs the kernels, here emulated ones."""

import pytest
import torch

from megavideo.benchmark import attention, contenders
from megavideo.benchmark.harness import Ceilings
from megavideo.layout.rules import Rule
from megavideo.ops import library as library_module
from tests.kernels.test_interval import library

CASE = attention.Case("windows", Rule(2, 6, window=4), 1, 0.0, 1, 64, 5, torch.bfloat16)


def test_the_kernels_are_timed_both_ways_and_others_compared_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = library()
    monkeypatch.setattr(library_module, "load", lambda: kernels)
    monkeypatch.setattr(contenders, "library_obstacle", lambda *situation: "")
    monkeypatch.setattr(attention, "INPUT_SETS", 1)
    rows = list(attention.measure(CASE, torch.device("cpu"), Ceilings(1e10, 1e10), rounds=2))
    ours = [row for row in rows if row["contender"] == attention.OURS]
    (both_ways,) = [row for row in rows if row["contender"] == "megavideo atomic"][1:]
    assert both_ways["us_median"] > 0
    assert [row["times_ours"] for row in ours] == [1.0, 1.0], ours
    assert kernels.counters.mma > 0
    others = [row for row in rows if row["contender"] == "sdpa mask"]
    for row, mine in zip(others, ours, strict=True):
        ratio = row["us_median"] / mine["us_median"]
        assert row["times_ours"] == pytest.approx(ratio, abs=1e-3)
