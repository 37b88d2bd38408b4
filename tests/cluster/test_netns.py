"""A host is lost, in small; `python -m tests.cluster.netns` has the demo's model and more cases."""

import time
from pathlib import Path

import pytest

from megavideo.checkpoint.commit import newest_whole
from megavideo.checkpoint.manifest import read_training
from tests.cluster.hosts import Cluster, not_permitted
from tests.cluster.job import losses, start
from tests.engine.dataset import make_dataset

REASON = not_permitted()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SETTINGS = ("recipe.steps=1000000", "run.save_every=40", "run.log_every=1", "run.evaluate_every=0")
TIMEOUT_S = 60.0


def test_one_of_two_hosts_dies_and_the_other_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    files = [str(make_dataset(tmp_path))]
    limit = f"run.timeout_minutes={TIMEOUT_S / 60}"
    with Cluster(2) as cluster:
        first, second = cluster.hosts
        job = start(cluster.hosts, "1:2", files, tmp_path / "lost", *SETTINGS, limit, restarts=1)
        job.wait_for_checkpoint()
        second.die()
        job.wait_for_loss_told([first], TIMEOUT_S)
        before = losses(job.run)
        end = time.monotonic() + 300
        while f"resumed {job.run}" not in job.log(first):
            assert time.monotonic() < end, job.logs()
            time.sleep(0.05)
        job.wait_for_step(max(before) + 1)
        job.stop(0)
        assert job.finish() == [0, -9], job.logs()
    after = losses(job.run)
    assert sorted(after) == list(range(1, max(after) + 1))
    # Two ranks, then one: the same samples and dropout, added up in another order.
    assert after == {**after, **{s: pytest.approx(before[s], rel=1e-4) for s in before}}
    checkpoint = newest_whole(job.run)
    assert checkpoint is not None
    progress = read_training(checkpoint).progress
    assert (progress.step, progress.consumed_samples) == (max(after), 4 * max(after))
