"""The interleaved schedule that is read from torch: complete, in order, and free of deadlocks."""

from collections import Counter
from typing import Any

import pytest

from megavideo.engine.pipeline import schedule
from megavideo.engine.pipeline.schedule import Action, InterleavedSchedule, interleaved_actions

LAYOUTS = [
    (stages, virtual, micro_batches)
    for stages in (2, 3, 4, 8)
    for virtual in (2, 3)
    for micro_batches in (1, stages - 1, stages, 2 * stages, 5 * stages)
]


@pytest.mark.parametrize(("stages", "virtual", "micro_batches"), LAYOUTS)
def test_every_run_computes_every_micro_batch_once_in_order(
    stages: int, virtual: int, micro_batches: int
) -> None:
    runs = stages * virtual
    for rank, actions in enumerate(interleaved_actions(stages, runs, micro_batches)):
        for run in range(runs):
            for kind in ("F", "B"):
                done = [a.micro_batch for a in actions if (a.kind, a.run) == (kind, run)]
                assert done == (list(range(micro_batches)) if run % stages == rank else [])


@pytest.mark.parametrize(("stages", "virtual", "micro_batches"), LAYOUTS)
def test_all_ranks_get_to_the_end_even_if_every_message_waits_for_its_receiver(
    stages: int, virtual: int, micro_batches: int
) -> None:
    runs = stages * virtual
    waiting = [list(actions) for actions in interleaved_actions(stages, runs, micro_batches)]
    here: set[Action] = set()  # computed, or received
    while any(waiting):
        before = sum(map(len, waiting))
        for rank, actions in enumerate(waiting):
            while actions and _compute(actions[0], runs, here):
                here.add(actions.pop(0))
            if actions and actions[0].kind.startswith("SEND"):
                message = _received(actions[0])
                receiver = waiting[message.run % stages]
                assert message.run % stages != rank
                if receiver and receiver[0] == message:
                    here.add(receiver.pop(0))
                    actions.pop(0)
        assert sum(map(len, waiting)) < before, f"stuck at {[w[:1] for w in waiting]}"


def _compute(action: Action, runs: int, here: set[Action]) -> bool:
    """Whether `action` is a computation; what it needs must be there."""
    if action.kind not in ("F", "B"):
        return False
    if action.kind == "F":
        needed = [action._replace(kind="RECV_F")] if action.run else []
    else:
        needed = [action._replace(kind="F")]
        needed += [action._replace(kind="RECV_B")] if action.run < runs - 1 else []
    assert set(needed) <= here, f"{action} comes too early"
    return True


def _received(sent: Action) -> Action:
    step = 1 if sent.kind == "SEND_F" else -1
    return Action(sent.kind.replace("SEND", "RECV"), sent.run + step, sent.micro_batch)


def test_evaluation_is_the_forward_half_without_an_update() -> None:
    names: Counter[str] = Counter()
    for step in InterleavedSchedule(4, 2, 0, 4, forward_only=True).steps():
        names.update(type(instruction).__name__ for instruction in step)
    assert names == {
        "LoadMicroBatch": 4, "ForwardPass": 8, "SendActivation": 8, "RecvActivation": 4
    }  # fmt: skip


def test_another_torch_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_messages(stages: int, runs: int, micro_batches: int) -> Any:
        raise AttributeError("'ScheduleInterleaved1F1B' has no 'pipeline_order_with_comms'")

    monkeypatch.setattr(schedule, "_arranged_by_torch", without_messages)
    with pytest.raises(
        ValueError, match=r"virtual_stages=2 reads .* set parallel.virtual_stages=1"
    ):
        interleaved_actions.__wrapped__(2, 4, 4)
