"""Tensor and sequence parallelism in DeepSpeed's hands: updates, norms, checkpoints."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megavideo.checkpoint.commit import list_checkpoints
from megavideo.engine.build import build_engine
from megavideo.engine.errors import RunFailed
from megavideo.engine.world import World, join_world
from megavideo.model.build import canonical_parameters
from megavideo.model.places import places
from megavideo.ops import pointwise
from megavideo.parallel.mesh import Mesh
from tests.engine.support import FINGERPRINT, config, micro_batches
from tests.engine.test_nonfinite import assert_leaves_no_trace
from tests.engine.test_parity import ADAMW, SGD, assert_trains_like_golden
from tests.engine.test_resume import DROPOUT, assert_resumes
from tests.world import run_world

# Recipe, optimizer, layout.
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
SLOTS: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
IMAGE = {"stage": "image"}
ON_TWO: list[Case] = [
    ({}, SGD, {"tp": 2, "zero": 0, "recompute": "mlp"}),
    ({}, ADAMW, {"tp": 2, "zero": 1, "recompute": "attention"}),
    ({}, ADAMW, SLOTS | {"zero": 1, "recompute": "layer", "compile": True}),
    (IMAGE, ADAMW, SLOTS | {"zero": 2}),
]
ON_FOUR: list[Case] = [
    ({}, SGD, {"tp": 2, "zero": 1}),
    ({}, ADAMW, {"tp": 2, "zero": 0}),
    ({}, ADAMW, {"tp": 2, "zero": 2}),
    ({}, ADAMW, {"tp": 2, "zero": 3}),
    ({}, ADAMW, SLOTS | {"zero": 1}),
    (IMAGE, SGD, SLOTS | {"zero": 1}),
    (IMAGE, ADAMW, SLOTS | {"zero": 3}),
]


def test_two_ranks_cut_layers_and_train_like_one(world: World, tmp_path: Path) -> None:
    run_world(_on_two, 2, tmp_path)
    assert_goes_on_alone(world, tmp_path / "saved")


@pytest.mark.slow
def test_two_replicas_of_two_ranks_train_like_one(world: World, tmp_path: Path) -> None:
    run_world(_on_four, 4, tmp_path)
    for zero in (0, 1, 2, 3):
        assert_goes_on_alone(world, tmp_path / f"saved-{zero}")


def _on_two(rank: int, folder: Path) -> None:
    pointwise.BACKEND = "aot_eager"  # traced and differentiated, but run by torch: no compiler
    world = _train_like_golden(folder, ON_TWO)
    _save_and_resume(world, folder / "saved", zero=1)
    for precision, zero in (("fp32", 0), ("bf16", 1), ("bf16", 2)):
        layout = SLOTS | {"zero": zero}
        run = folder / f"skip-{precision}-{zero}"
        settings = config(run, {"precision": precision}, parallel=layout)
        assert_leaves_no_trace(settings, world, math.inf)
    _notice_a_changed_weight(world, folder / "changed")


def _on_four(rank: int, folder: Path) -> None:
    world = _train_like_golden(folder, ON_FOUR)
    for zero in (0, 1, 2, 3):
        _save_and_resume(world, folder / f"saved-{zero}", zero)


def _train_like_golden(folder: Path, cases: list[Case]) -> World:
    world = join_world(timeout_minutes=1.0)
    world = replace(world, mesh=Mesh.build(pp=1, tp=2))
    for number, (recipe, optimizer, layout) in enumerate(cases):
        settings = config(folder / str(number), recipe, optimizer, layout)
        assert_trains_like_golden(settings, world)
    return world


def _save_and_resume(world: World, run: Path, zero: int) -> None:
    assert_resumes(world, config(run, DROPOUT, ADAMW, SLOTS | {"zero": zero}))


def assert_goes_on_alone(world: World, run: Path) -> None:
    """One process goes on from it; its frozen base, hashed whole, is the same."""
    assert list_checkpoints(run), "it was saved"
    alone = build_engine(config(run, optimizer=ADAMW), world, FINGERPRINT)
    assert alone.progress.updates == 2
    assert not alone.train_batch(micro_batches(16)).skipped
    fresh = build_engine(config(run.parent / "fresh", optimizer=ADAMW), world, FINGERPRINT)
    assert fresh.frozen.digest == alone.frozen.digest


def _notice_a_changed_weight(world: World, run: Path) -> None:
    """In a rank's part of a parameter, and in the head's copy of image rows."""
    settings = config(run, parallel={"tp": 2})
    engine = build_engine(settings, world, FINGERPRINT)
    name = "layers.1.mlp.up.weight"
    with torch.no_grad():
        if world.rank == 1:
            canonical_parameters(engine._home.module)[name].view(-1)[3] += 1e-3
    with pytest.raises(RunFailed, match=rf"changed during training: {name} on rank 1"):
        engine.frozen.check()
    engine = build_engine(settings, world, FINGERPRINT)
    with torch.no_grad():
        if world.rank == 0:
            places(engine._home.module)[-1].memory.view(-1)[3] += 1e-3
    with pytest.raises(RunFailed, match=r"changed during training: head\.rows on rank 0"):
        engine.frozen.check()
