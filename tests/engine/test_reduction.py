"""In which type gradients are summed over replicas."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megavideo.engine.build import build_engine
from megavideo.engine.world import World
from tests.engine.support import FINGERPRINT, config, micro_batches


def test_what_bf16_adds_up_in_float32_is_summed_over_replicas_in_float32(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, {"precision": "bf16"}, parallel={"zero": 1})
    engine = build_engine(settings, world, FINGERPRINT)
    summed: list[tuple[torch.dtype, int]] = []
    all_reduce = dist.all_reduce

    def noted(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        summed.append((tensor.dtype, tensor.numel()))
        return all_reduce(tensor, *arguments, **named)

    monkeypatch.setattr(dist, "all_reduce", noted)
    engine.train_batch(micro_batches(0))
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    gradients = [(dtype, count) for dtype, count in summed if count > 1]
    assert sum(count for _, count in gradients) == trained
    assert {dtype for dtype, _ in gradients} == {torch.float32}
