"""The planner draws the interleaved schedule that the engine runs."""

import pytest

from megavideo.engine.pipeline.schedule import interleaved_actions
from megavideo.plan.schedule import orders


@pytest.mark.parametrize(
    ("pp", "chunks", "micro_batches"), [(2, 2, 4), (2, 3, 2), (4, 2, 8), (4, 4, 16), (3, 2, 5)]
)
def test_planned_passes_are_those_of_the_engine(pp: int, chunks: int, micro_batches: int) -> None:
    engine = interleaved_actions(pp, pp * chunks, micro_batches)
    passes = [
        [(a.kind == "F", a.run, a.micro_batch) for a in actions if a.kind in ("F", "B")]
        for actions in engine
    ]
    planned = [
        [(a.forward, a.run, a.micro_batch) for a in order]
        for order in orders(pp, chunks, micro_batches)
    ]
    assert planned == passes
