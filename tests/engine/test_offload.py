"""Optimizer state in host memory: the same training, the same skipped steps, the same resume."""

import math
from pathlib import Path
from typing import Any

import pytest

from megavideo.engine.build import build_engine
from megavideo.engine.world import World
from tests.engine.support import FINGERPRINT, config, micro_batches
from tests.engine.test_nonfinite import assert_leaves_no_trace, assert_same_state
from tests.engine.test_parity import ADAMW, SGD, assert_trains_like_golden
from tests.engine.test_resume import DROPOUT
from tests.engine.test_two_ranks import assert_resumes


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw-clipped"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_zero_stage_trains_like_a_plain_loop(
    zero: int, optimizer: dict[str, Any], world: World, tmp_path: Path
) -> None:
    layout = {"zero": zero, "offload_optimizer": True}
    assert_trains_like_golden(config(tmp_path, {}, optimizer, layout), world)


def test_in_bf16_it_is_bit_for_bit_what_it_is_without(world: World, tmp_path: Path) -> None:
    engines = []
    for offload in (False, True):
        layout = {"zero": 3, "offload_optimizer": offload}
        run = tmp_path / str(offload)
        settings = config(run, {**DROPOUT, "precision": "bf16"}, ADAMW, layout)
        engines.append(build_engine(settings, world, FINGERPRINT))
        for _ in range(3):
            engines[-1].train_batch(micro_batches(engines[-1].progress.consumed_samples))
    assert_same_state(*engines)


@pytest.mark.parametrize(("precision", "zero"), [("fp32", 1), ("fp32", 2), ("bf16", 3)])
def test_skipped_steps_leave_no_trace_and_a_resume_is_exact(
    precision: str, zero: int, world: World, tmp_path: Path
) -> None:
    layout = {"zero": zero, "offload_optimizer": True}
    settings = config(tmp_path, {**DROPOUT, "precision": precision}, {}, layout)
    assert_leaves_no_trace(settings, world, math.inf)
    assert_resumes(world, settings)
