"""Two data-parallel ranks: the same updates as one, the same skipped steps, the same resume."""

import math
from pathlib import Path

import pytest

from megavideo.checkpoint.commit import list_checkpoints
from megavideo.config.schema import Config
from megavideo.engine.build import build_engine
from megavideo.engine.snapshot import save_checkpoint
from megavideo.engine.world import World, join_world
from tests.engine.support import FINGERPRINT, config, micro_batches
from tests.engine.test_nonfinite import HOMES, assert_leaves_no_trace, assert_same_state
from tests.engine.test_parity import ADAMW, SGD, assert_trains_like_golden
from tests.engine.test_resume import DROPOUT
from tests.world import run_world


@pytest.mark.slow
def test_two_ranks_train_skip_and_resume_like_one(world: World, tmp_path: Path) -> None:
    # One world for all: starting one costs as much as everything that it does here.
    run_world(_on_two_ranks, 2, tmp_path)
    for zero in (0, 1, 2, 3):
        saved = tmp_path / f"resume-{zero}"
        assert list_checkpoints(saved), "rank 0 saved"
        alone = build_engine(config(saved, parallel={"zero": 1}), world, FINGERPRINT)
        assert alone.progress.updates == 2
        assert not alone.train_batch(micro_batches(16)).skipped


def _on_two_ranks(rank: int, folder: Path) -> None:
    world = join_world(timeout_minutes=1.0)
    for zero in (0, 1, 2, 3):
        for optimizer in (SGD, ADAMW):
            run = folder / f"parity-{zero}-{optimizer['name']}"
            assert_trains_like_golden(config(run, {}, optimizer, {"zero": zero}), world)
        assert_resumes(world, config(folder / f"resume-{zero}", DROPOUT, {}, {"zero": zero}))
    for precision, zero in HOMES:
        harm = math.nan if rank == 1 else 0.0  # one rank's loss makes both skip
        run = folder / f"skip-{precision}-{zero}"
        assert_leaves_no_trace(precision, {"zero": zero}, world, run, harm)


def assert_resumes(world: World, settings: Config) -> None:
    """Two steps, a save, and a resume that goes on bit for bit."""
    engine = build_engine(settings, world, FINGERPRINT)
    replica = world.mesh.dp
    batches = micro_batches(0, replica.rank, replica.size)
    for _ in range(2):
        engine.train_batch(batches)
    save_checkpoint(engine, settings, FINGERPRINT)
    resumed = build_engine(settings, world, FINGERPRINT)
    assert_same_state(resumed, engine)
    again = resumed.train_batch(micro_batches(16, replica.rank, replica.size))
    assert again.loss == engine.train_batch(batches).loss
    assert_same_state(resumed, engine)
