"""One world of one process for all engine tests, which leave no trace in other tests."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist
import torch.nn.functional as F

from megavideo.engine.world import World, join_world


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """A process group of this process alone."""
    yield join_world(timeout_minutes=1.0)
    if dist.is_initialized():  # a command that ran in this process may have left it already
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def torchs_own_linear() -> Iterator[None]:
    """ZeRO 3 replaces torch's linear in the whole process, and never puts it back."""
    linear = F.linear
    yield
    F.linear = linear
