"""Joining a world and leaving it: what is refused, and who says so."""

import atexit

import pytest
import torch
import torch.distributed as dist

from megavideo.engine.world import World, join_world


def test_a_process_without_a_gpu_of_its_own_says_what_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(ValueError, match=r"process 8 has no GPU .* sees 8; start --nproc-per-node"):
        join_world(timeout_minutes=1.0)


@pytest.mark.parametrize("everywhere", [False, True])
def test_rank_zero_tells_a_mistake_before_it_leaves_the_world(
    everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ValueError("the mistake")

    left: list[str] = []
    monkeypatch.setattr(dist, "broadcast_object_list", lambda *arguments, **named: None)
    monkeypatch.setattr(dist, "all_gather_object", lambda values, mine: values.__setitem__(0, mine))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append("now"))
    monkeypatch.setattr(atexit, "register", lambda function: left.append("at exit"))
    world = World(rank=0, size=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="the mistake"):
        (world.together if everywhere else world.from_rank_zero)(refuse)
    assert left == ["at exit"]
