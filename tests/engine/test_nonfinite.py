"""A loss or gradient that is not finite skips the step everywhere, and leaves no trace."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megavideo.config.schema import Config
from megavideo.engine.build import build_engine
from megavideo.engine.engine import Engine
from megavideo.engine.world import World
from tests.engine.support import FINGERPRINT, config, micro_batches

HOMES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


class Poisoned:
    """Losses that go wrong in chosen calls."""

    def __init__(self, losses: Callable[[Tensor, Tensor], Tensor], calls: set[int], harm: float):
        self.losses, self.calls, self.harm, self.call = losses, calls, harm, 0

    def __call__(self, logits: Tensor, image: Tensor) -> Tensor:
        losses = self.losses(logits, image)
        self.call += 1
        # Added to the loss, infinity leaves its gradient finite: the loss alone must stop the step.
        return losses + self.harm if self.call in self.calls else losses


def poison(engine: Engine, calls: set[int], harm: float) -> None:
    """Let the losses of `engine` go wrong in these of its calls."""
    objective: Any = engine._home.objective
    objective.losses = Poisoned(objective.losses, calls, harm)


@pytest.mark.parametrize(("precision", "zero"), HOMES)
def test_a_skipped_step_leaves_no_trace(
    precision: str, zero: int, world: World, tmp_path: Path
) -> None:
    settings = config(tmp_path, {"precision": precision}, parallel={"zero": zero})
    assert_leaves_no_trace(settings, world, math.inf)


def assert_leaves_no_trace(settings: Config, world: World, harm: float) -> None:
    """Step, step with harm in the second micro-batch, step: as if the second had not been."""
    engine = build_engine(settings, world, FINGERPRINT)
    steps = settings.recipe.batch // (settings.recipe.micro_batch * world.mesh.dp.size)
    poison(engine, {steps + 2}, harm)
    replica = world.mesh.dp
    batches = micro_batches(0, replica.rank, replica.size)
    results = [engine.train_batch(batches) for _ in range(3)]
    assert [result.skipped for result in results] == [False, True, False]
    assert not math.isfinite(results[1].loss)
    assert results[1].diverging
    assert results[1].learning_rate == results[2].learning_rate
    assert engine.progress.step == 3
    assert engine.progress.updates == 2
    assert engine.progress.consumed_samples == 24

    other = build_engine(settings, world, FINGERPRINT)  # nothing was saved: it starts again
    other.train_batch(micro_batches(0, replica.rank, replica.size))
    other.progress = replace(other.progress, step=2, consumed_samples=16)
    other.train_batch(micro_batches(16, replica.rank, replica.size))
    assert_same_state(engine, other)


def assert_same_state(one: Engine, other: Engine) -> None:
    """Weights and moments, bit for bit."""
    for gather in ("gather_weights", "gather_moments"):
        ours, theirs = getattr(one.state, gather)(), getattr(other.state, gather)()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
