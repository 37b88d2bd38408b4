"""Pipeline stages train like one process: same updates, skipped steps, evaluation and resume."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megavideo.config.schema import Config
from megavideo.engine.build import build_engine
from megavideo.engine.errors import RunFailed
from megavideo.engine.world import World, join_world
from megavideo.model.build import canonical_parameters
from megavideo.ops import pointwise
from tests.engine import support
from tests.engine.support import (
    FINGERPRINT,
    MODEL,
    Golden,
    batch_at,
    micro_batches,
    save_checkpoint,
)
from tests.engine.test_nonfinite import assert_leaves_no_trace
from tests.engine.test_parity import ADAMW, LOSS_TOLERANCE, SGD, assert_trains_like_golden
from tests.engine.test_resume import DROPOUT
from tests.engine.test_two_ranks import assert_resumes
from tests.world import run_world

DEEP = MODEL.model_copy(update={"layers": 4})
TWO_STAGES = {"pp": 2, "zero": 1}
STILL = {**SGD, "lr": 1e-30}  # steps leave the weights where they are
INTERLEAVED = {**TWO_STAGES, "virtual_stages": 2}


def config(folder: Path, *settings: dict[str, Any]) -> Config:
    """As support.config, with a model deep enough to be cut."""
    return support.config(folder, *settings, model=DEEP)


@pytest.mark.slow
def test_two_stages_train_skip_evaluate_and_resume_like_one(tmp_path: Path) -> None:
    # One world for all: starting one costs as much as everything that it does here.
    run_world(_on_two_stages, 2, tmp_path)


def _on_two_stages(rank: int, folder: Path) -> None:
    pointwise.BACKEND = "aot_eager"  # traced and differentiated, but run by torch: no compiler
    world = join_world(1.0, config(folder, {}, {}, TWO_STAGES).parallel)
    for number, (optimizer, layout) in enumerate(
        [
            (ADAMW, {"pp": 2, "zero": 0}),
            (SGD, {**TWO_STAGES, "recompute": "layer", "partition": (2, 4)}),
            (ADAMW, {**INTERLEAVED, "recompute": "layer", "compile": True}),
        ]
    ):
        run = folder / f"parity-{number}"
        assert_trains_like_golden(config(run, {}, optimizer, layout), world)
    for number, (precision, layout) in enumerate(
        [("fp32", {"pp": 2, "zero": 0}), ("bf16", TWO_STAGES), ("fp32", INTERLEAVED)]
    ):
        run = folder / f"state-{number}"
        recipe = {**DROPOUT, "precision": precision}
        assert_leaves_no_trace(config(run / "skip", recipe, {}, layout), world, math.inf)
        assert_resumes(world, config(run / "resume", recipe, {}, {**layout, "recompute": "layer"}))
    _assert_evaluates(world, config(folder / "a", DROPOUT, STILL, TWO_STAGES))
    _assert_evaluates(world, config(folder / "b", DROPOUT, STILL, INTERLEAVED))
    _assert_catches_a_changed_frozen_weight(world, folder / "tripwire")


def _assert_evaluates(world: World, settings: Config) -> None:
    """Without dropout, before and after a step; every rank is told."""
    engine, golden = build_engine(settings, world, FINGERPRINT), Golden(settings)
    golden.model.eval()
    expected = golden.objective(golden.model, batch_at(range(100, 102))).detach()
    for _ in range(2):
        with engine.evaluating():
            losses = engine.frame_losses(batch_at(range(100, 102)))
        torch.testing.assert_close(losses, expected, rtol=LOSS_TOLERANCE, atol=0)
        engine.train_batch(micro_batches(0))


def _assert_catches_a_changed_frozen_weight(world: World, folder: Path) -> None:
    settings = config(folder, {}, {}, TWO_STAGES)
    engine = build_engine(settings, world, FINGERPRINT)
    name = "layers.3.mlp.up.weight"
    held = canonical_parameters(engine._home.module)
    assert (name in held) == (world.rank == 1), "each stage holds its own layers only"
    with torch.no_grad():
        if name in held:
            held[name].view(-1)[7] += 1e-3
    with pytest.raises(RunFailed, match=f"changed during training: {name}"):
        save_checkpoint(engine, settings, FINGERPRINT)


@pytest.mark.slow
def test_stages_and_replicas_together_train_like_one_process(tmp_path: Path) -> None:
    run_world(_on_two_replicas_of_two_stages, 4, tmp_path)


def _on_two_replicas_of_two_stages(rank: int, folder: Path) -> None:
    world = join_world(1.0, config(folder, {}, {}, TWO_STAGES).parallel)
    for zero in (0, 1):
        settings = config(folder / f"parity-{zero}", {}, ADAMW, {"pp": 2, "zero": zero})
        assert_trains_like_golden(settings, world)
    harm = math.nan if world.mesh.dp.rank == 1 else 0.0  # one replica's loss makes both skip
    assert_leaves_no_trace(config(folder / "skip", {}, {}, TWO_STAGES), world, harm)
    assert_resumes(world, config(folder / "resume", DROPOUT, {}, TWO_STAGES))
