"""Two data-parallel ranks: the same updates as one, the same skipped steps, the same resume."""

import errno
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megavideo.checkpoint.commit import list_checkpoints
from megavideo.checkpoint.part_file import write_part_file
from megavideo.engine import snapshot
from megavideo.engine.build import build_engine
from megavideo.engine.errors import RunFailed
from megavideo.engine.frozen import FrozenWeights
from megavideo.engine.snapshot import Saver
from megavideo.engine.world import World, join_world
from megavideo.model.build import canonical_parameters
from tests.engine.support import FINGERPRINT, config, micro_batches
from tests.engine.test_nonfinite import HOMES, assert_leaves_no_trace
from tests.engine.test_parity import ADAMW, SGD, assert_trains_like_golden
from tests.engine.test_resume import DROPOUT, assert_resumes
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
    assert_a_failure_on_one_rank_is_told_on_all(world, folder / "failing")
    assert_a_flipped_bit_names_its_rank(world, folder / "flipped")
    for precision, zero in HOMES:
        harm = math.nan if rank == 1 else 0.0  # one rank's loss makes both skip
        run = folder / f"skip-{precision}-{zero}"
        settings = config(run, {"precision": precision}, parallel={"zero": zero})
        assert_leaves_no_trace(settings, world, harm)


def assert_a_failure_on_one_rank_is_told_on_all(world: World, run: Path) -> None:
    """Rank 1's disk is full: nothing is committed, and both ranks know why."""
    settings = config(run, parallel={"zero": 2})
    engine = build_engine(settings, world, FINGERPRINT)
    saver = Saver(engine, settings, FINGERPRINT)
    wrote = []

    def write(path: Path, tensors: dict[str, Tensor]) -> str:
        wrote.append(path)
        if world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write_part_file(path, tensors)

    snapshot.write_part_file = write
    try:
        saver.save()
        saved = saver.finish()
    finally:
        snapshot.write_part_file = write_part_file
    assert wrote, "both ranks write"
    assert saved is not None and saved.problem is not None
    assert saved.problem.startswith("rank 1: [Errno 28] No space left on device")
    assert not list_checkpoints(run)
    saver.save()
    saved = saver.finish()
    assert saved is not None and saved.problem is None


def assert_a_flipped_bit_names_its_rank(world: World, run: Path) -> None:
    """One bit of a frozen weight in rank 1's memory; later, already when the run starts."""
    settings = config(run)
    engine = build_engine(settings, world, FINGERPRINT)
    parameters = canonical_parameters(engine._home.module)
    if world.rank == 1:
        with torch.no_grad():
            parameters["layers.1.mlp.up.weight"].view(torch.int32).view(-1)[5] ^= 1
    with pytest.raises(
        RunFailed, match=r"changed during training: layers\.1\.mlp\.up\.weight on rank 1\."
    ):
        engine.frozen.check()
    with pytest.raises(
        RunFailed, match=r"between replicas: layers\.1\.mlp\.up\.weight on ranks 0 and 1\."
    ):
        FrozenWeights(parameters, {}, world)
