"""One world of one process for all engine tests of this pytest process."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megavideo.engine.world import World, join_world


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """A process group of this process alone."""
    yield join_world(timeout_minutes=1.0)
    dist.destroy_process_group()
