"""The learning rate against the published schedule's numbers."""

import pytest

from megavideo.config.schema import ScheduleConfig
from megavideo.engine.schedule import learning_rate

PUBLISHED = ScheduleConfig(horizon=500_000, warmup=0.001, floor=0.1, hold_steps=100, hold_rate=0.05)


@pytest.mark.parametrize(
    ("count", "rate"),
    [
        (1, 1e-5),
        (100, 1e-5),  # the hold's last
        (101, 4.04e-5),  # the warm-up has gone on meanwhile
        (500, 2e-4),
        (1000, 1.99999556e-4),
        (500_000, 2.00004441e-5),  # the cosine ends 500 counts later
        (500_500, 2e-5),
        (900_000, 2e-5),
    ],
)
def test_the_published_numbers(count: int, rate: float) -> None:
    assert learning_rate(count, 2e-4, PUBLISHED) == pytest.approx(rate, rel=1e-8)


def test_a_fresh_run_has_no_hold() -> None:
    fresh = PUBLISHED.model_copy(update={"hold_steps": 0})
    assert learning_rate(1, 2e-4, fresh) == pytest.approx(4e-7)


def test_no_warm_up_starts_on_the_cosine() -> None:
    schedule = ScheduleConfig(horizon=10, warmup=0.0, floor=0.0, hold_steps=0)
    assert learning_rate(5, 1.0, schedule) == pytest.approx(0.5)
    assert learning_rate(10, 1.0, schedule) == pytest.approx(0.0)
