"""How long a rank waits for the others, and how it says that one is lost."""

from datetime import timedelta

import torch
import torch.distributed as dist

from megavideo.engine.errors import rank_lost
from megavideo.engine.world import World


def test_groups_that_others_make_wait_no_longer_than_configured(world: World) -> None:
    group = dist.new_group([0])
    backend = group._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(minutes=1)


def test_only_a_failed_collective_is_a_lost_rank() -> None:
    closed = "[third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
    assert rank_lost(RuntimeError(closed))
    assert rank_lost(dist.DistBackendError("NCCL communicator was aborted"))
    assert not rank_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
