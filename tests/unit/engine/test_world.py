"""Joining a world: what is refused before any process waits for another."""

import pytest
import torch

from megavideo.engine.world import join_world


def test_a_process_without_a_gpu_of_its_own_says_what_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(ValueError, match=r"process 8 has no GPU .* sees 8; start --nproc-per-node"):
        join_world(timeout_minutes=1.0)
