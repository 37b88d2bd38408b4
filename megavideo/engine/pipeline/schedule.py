"""Interleaved 1F1B (Narayanan et al. 2021) as instructions for DeepSpeed's pipeline engine.

torch.distributed.pipelining arranges it: each rank's list of actions, sends and receives among
them, in one order of messages that all ranks keep. Only this arrangement is torch's; the work is
done by DeepSpeed's engine (interleaved.py).
"""

from collections.abc import Iterator
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.distributed.pipelining import ScheduleInterleaved1F1B

from megavideo.engine.quiet import deepspeed

pipe = deepspeed.runtime.pipe.schedule
PipeSchedule: Any = pipe.PipeSchedule

# torch's action -> DeepSpeed's instruction; others (resharding) concern nothing here.
INSTRUCTIONS = {
    "F": pipe.ForwardPass,
    "B": pipe.BackwardPass,
    "SEND_F": pipe.SendActivation,
    "RECV_F": pipe.RecvActivation,
    "SEND_B": pipe.SendGrad,
    "RECV_B": pipe.RecvGrad,
}
FORWARD = ("F", "SEND_F", "RECV_F")


class Action(NamedTuple):
    """One thing to do with micro-batch `micro_batch` in run `run` of the layers."""

    kind: str
    run: int
    micro_batch: int


class InterleavedSchedule(PipeSchedule):
    """What one rank does for a batch: a step for each of its actions, then the optimizer's.

    An instruction says which of the rank's runs (`chunk`) it concerns; each micro-batch has a
    buffer of its own in each of them.

    Args:
        forward_only: for evaluation.
    """

    def __init__(
        self, micro_batches: int, stages: int, stage_id: int, runs: int, forward_only: bool = False
    ):
        super().__init__(micro_batches, stages, stage_id)
        self._runs = runs
        self._forward_only = forward_only

    def num_pipe_buffers(self) -> int:
        return self._runs // self.stages * self.micro_batches

    def steps(self) -> Iterator[list[Any]]:
        actions = interleaved_actions(self.stages, self._runs, self.micro_batches)
        for action in actions[self.stage_id]:
            if action.kind in FORWARD or not self._forward_only:
                yield self._instructions(action)
        if not self._forward_only:
            yield [pipe.ReduceGrads(), pipe.OptimizerStep()]

    def _instructions(self, action: Action) -> list[Any]:
        chunk = action.run // self.stages
        buffer = chunk * self.micro_batches + action.micro_batch
        instructions = [INSTRUCTIONS[action.kind](buffer, chunk=chunk)]
        if action.kind == "F" and action.run in (0, self._runs - 1):
            instructions.insert(0, pipe.LoadMicroBatch(buffer, chunk=chunk))
        return instructions


@lru_cache(maxsize=4)
def interleaved_actions(stages: int, runs: int, micro_batches: int) -> list[list[Action]]:
    """Each rank's actions, in order.

    Raises:
        ValueError: if this torch arranges schedules in another way than 2.11 to 2.13 do.
    """
    try:
        arranged = _arranged_by_torch(stages, runs, micro_batches)
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"parallel.virtual_stages={runs // stages} reads torch's interleaved schedule as torch "
            f"2.11 to 2.13 have it, but {torch.__version__} has another ({error!r}); set "
            "parallel.virtual_stages=1"
        ) from error
    return [
        [action for action in arranged[rank] if action.kind in INSTRUCTIONS]
        for rank in range(stages)
    ]


def _arranged_by_torch(stages: int, runs: int, micro_batches: int) -> dict[int, list[Action]]:
    # Of its stages, the schedule reads only where they are.
    held = [
        SimpleNamespace(num_stages=runs, group_size=stages, group_rank=0, stage_index=index)
        for index in range(0, runs, stages)
    ]
    schedule: Any = ScheduleInterleaved1F1B(held, micro_batches)  # type: ignore[arg-type]
    return {
        rank: [Action(a.computation_type.value, a.stage_index, a.microbatch_index) for a in actions]
        for rank, actions in schedule.pipeline_order_with_comms.items()
    }
