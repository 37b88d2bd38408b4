"""Checks of the learning-rate schedule at every published step."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from megavideo.config.schema import ScheduleConfig
from megavideo.engine.schedule import learning_rate
from megavideo.verify.compare import Row, compare


def schedule_rows(
    case: str, meta: dict[str, Any], values: Mapping[str, np.ndarray]
) -> Iterator[Row]:
    """Compare the learning rate at each scheduler count of the case."""
    schedule = ScheduleConfig(
        horizon=meta["train_iters"],
        warmup=meta["warmup"],
        floor=meta["lr_decay_ratio"],
        hold_steps=meta["auto_warmup_steps"],
        hold_rate=meta["auto_warmup_rate"],
    )
    ours = np.array([learning_rate(int(n), meta["start_lr"], schedule) for n in values["step"]])
    yield compare(case, "lr", ours, values["lr"], "float64")
