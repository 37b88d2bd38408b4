"""What a run holds on one device, all tensors counted, against what the planner says."""

from pathlib import Path

import pytest

from megavideo.config.schema import ModelConfig
from megavideo.engine.build import build_engine
from megavideo.engine.world import World
from megavideo.plan.activations import Ledger
from megavideo.plan.memory import memory_by_stage
from megavideo.verify.made_up import micro_batches
from tests.engine import support
from tests.engine.live_bytes import LiveBytes
from tests.engine.support import FINGERPRINT

# Wide, so that weights count and not the bits around them.
MODEL = ModelConfig.model_validate({**dict(support.MODEL), "hidden": 256, "layers": 3})
TOLERANCE = 0.02


@pytest.mark.parametrize("recompute", ["layer", "none"])
def test_a_bf16_run_holds_what_is_planned_and_building_it_no_more(
    recompute: str, world: World, tmp_path: Path
) -> None:
    settings = support.config(
        tmp_path, {"precision": "bf16"}, {}, {"recompute": recompute}, model=MODEL
    )
    (planned,) = memory_by_stage(settings, 1, Ledger(settings, "reference", on_gpu=False))
    at_rest = planned.parameters + planned.gradients + planned.optimizer
    with LiveBytes() as live:
        engine = build_engine(settings, world, FINGERPRINT, keep_base=False)
        before_adam = planned.parameters + planned.gradients + planned.optimizer // 3
        assert live.now == pytest.approx(before_adam, rel=TOLERANCE)
        assert live.peak < at_rest, "building needs less than training"
        batches = micro_batches(MODEL, MODEL.frames, 2, 0, 1, 0)
        engine.train_batch(batches)
        live.restart()
        engine.train_batch(batches)
        assert live.now == pytest.approx(at_rest, rel=TOLERANCE)
        assert live.peak == pytest.approx(planned.total, rel=TOLERANCE)
