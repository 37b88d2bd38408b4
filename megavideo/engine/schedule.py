"""The published learning-rate schedule, as a pure function."""

import math

from megavideo.config.schema import ScheduleConfig


def learning_rate(n: int, lr: float, schedule: ScheduleConfig) -> float:
    """Learning rate of the update with scheduler count `n` (CogVideo's fine-tuning schedule).

    `n` is 1 for the first update and grows by one with each update that is applied; a skipped
    step does not advance it. Three parts: `hold_steps` at `hold_rate`, then a linear warm-up that
    goes on as if there had been no hold, then a cosine from 1 to `floor`. The published cosine runs
    over `horizon` counts after the warm-up, not over what the warm-up left.

    When it resumes at iteration i, the published code holds until max(i, hold_steps), which lies
    before every count that follows: a resume changes nothing, so it is no argument here.
    """
    warmup = schedule.warmup * schedule.horizon
    if n <= schedule.hold_steps:
        return schedule.hold_rate * lr
    if n <= warmup:
        return lr * n / warmup
    done = min(1.0, (n - warmup) / schedule.horizon)
    return lr * (schedule.floor + (1 - schedule.floor) * (1 + math.cos(math.pi * done)) / 2)
