"""DeepSpeed's pipeline engine with several runs of layers on each rank (interleaved 1F1B).

Messages are started in the schedule's order and awaited where their contents are needed, so a rank
computes while they travel. The run in work says whether this rank is now the first or the last
stage, which is all that DeepSpeed's own forward and backward pass ask.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from megavideo.engine.pipeline.execution import ExactPipelineEngine
from megavideo.engine.pipeline.schedule import InterleavedSchedule, pipe

# A sent tensor is kept until this many others were sent: the message has gone by then.
SENDS_UNDER_WAY = 4


class InterleavedPipelineEngine(ExactPipelineEngine):
    """Runs an `InterleavedSchedule`; `chunk` is the place of a run among this rank's."""

    def __init__(self, *arguments: Any):
        self._chunk: int | None = None
        self._sends: deque[list[dist.Work]] = deque()
        self._awaited: dict[tuple[str, int], list[dist.Work]] = {}
        self._told: set[int] = set()  # chunks whose next stage knows the shapes
        self._specs: dict[int, list[tuple[torch.Size, torch.dtype]]] = {}
        super().__init__(*arguments)
        self.pipe_buffers |= {"losses": [], "grads": []}

    def is_first_stage(self) -> bool:
        """Of the run in work; of the rank between runs."""
        return super().is_first_stage() and self._chunk in (None, 0)

    def is_last_stage(self) -> bool:
        """Of the run in work; of the rank between runs."""
        return super().is_last_stage() and self._chunk in (None, len(self.module.runs) - 1)

    def _train_schedule(self) -> InterleavedSchedule:
        return self._schedule(self.micro_batches, forward_only=False)

    def _inference_schedule(self, micro_batches: int) -> InterleavedSchedule:
        return self._schedule(micro_batches, forward_only=True)

    def _schedule(self, micro_batches: int, forward_only: bool) -> InterleavedSchedule:
        return InterleavedSchedule(
            micro_batches, self.num_stages, self.stage_id, self.module.num_runs, forward_only
        )

    def _exec_schedule(self, schedule: InterleavedSchedule) -> None:
        super()._exec_schedule(schedule)
        while self._sends:
            _wait(self._sends.popleft())

    @contextmanager
    def _working_on(self, chunk: int) -> Iterator[None]:
        self._chunk = self.module.active = chunk
        try:
            yield
        finally:
            self._chunk = None

    def _exec_load_micro_batch(self, buffer_id: int, chunk: int) -> None:
        with self._working_on(chunk):
            super()._exec_load_micro_batch(buffer_id)

    def _exec_forward_pass(self, buffer_id: int, chunk: int) -> None:
        self._await("inputs", buffer_id)
        with self._working_on(chunk):
            super()._exec_forward_pass(buffer_id)
            if self.is_last_stage():
                self.pipe_buffers["losses"][buffer_id] = self.loss
        if not torch.is_grad_enabled():
            self._free(buffer_id, "inputs", "labels", "losses")

    def _exec_backward_pass(self, buffer_id: int, chunk: int) -> None:
        self._await("grads", buffer_id)
        self.loss = self.pipe_buffers["losses"][buffer_id]
        self.grad_layer = self.pipe_buffers["grads"][buffer_id]
        with self._working_on(chunk):
            super()._exec_backward_pass(buffer_id)
            if self.is_first_stage():
                self._free(buffer_id, "inputs")
        self._free(buffer_id, "outputs", "labels", "losses", "grads")

    def _exec_send_activations(self, buffer_id: int, chunk: int) -> None:
        outputs = self.pipe_buffers["outputs"][buffer_id]
        receiver = (self.stage_id + 1) % self.num_stages
        if chunk not in self._told:
            self._told.add(chunk)
            self._send_tensor_meta(outputs, receiver)
        self._send(outputs, receiver)
        if not torch.is_grad_enabled():
            self._free(buffer_id, "outputs")

    def _exec_recv_activations(self, buffer_id: int, chunk: int) -> None:
        sender = (self.stage_id - 1) % self.num_stages
        if chunk not in self._specs:
            self._specs[chunk] = [(t.shape, t.dtype) for t in self._recv_tensor_meta(sender)]
        self._receive("inputs", buffer_id, self._specs[chunk], sender)

    def _exec_send_grads(self, buffer_id: int, chunk: int) -> None:
        states, _ = self.pipe_buffers["inputs"][buffer_id]
        self._send((states.grad,), (self.stage_id - 1) % self.num_stages)
        self._free(buffer_id, "inputs")

    def _exec_recv_grads(self, buffer_id: int, chunk: int) -> None:
        states, _ = self.pipe_buffers["outputs"][buffer_id]
        specs = [(states.shape, states.dtype)]
        self._receive("grads", buffer_id, specs, (self.stage_id + 1) % self.num_stages)

    def _send(self, tensors: tuple[Tensor, ...], stage: int) -> None:
        self._sends.append(self._start(dist.isend, [t.detach() for t in tensors], stage))
        if len(self._sends) > SENDS_UNDER_WAY:
            _wait(self._sends.popleft())

    def _receive(
        self, kind: str, buffer_id: int, specs: list[tuple[torch.Size, torch.dtype]], stage: int
    ) -> None:
        received = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in specs]
        self.pipe_buffers[kind][buffer_id] = tuple(received)
        self._awaited[kind, buffer_id] = self._start(dist.irecv, received, stage)

    def _start(self, operation: Any, tensors: list[Tensor], stage: int) -> list[dist.Work]:
        peer = self.grid.stage_to_global(stage)
        return dist.batch_isend_irecv([dist.P2POp(operation, t, peer) for t in tensors])

    def _await(self, kind: str, buffer_id: int) -> None:
        """Until what was received is there; inputs then collect a gradient."""
        if (kind, buffer_id) in self._awaited:
            _wait(self._awaited.pop((kind, buffer_id)))
            if kind == "inputs":
                self.pipe_buffers[kind][buffer_id][0].requires_grad_()

    def _free(self, buffer_id: int, *kinds: str) -> None:
        for kind in kinds:
            self.pipe_buffers[kind][buffer_id] = None

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **ExactPipelineEngine._INSTRUCTION_MAP,
        pipe.LoadMicroBatch: _exec_load_micro_batch,
        pipe.ForwardPass: _exec_forward_pass,
        pipe.BackwardPass: _exec_backward_pass,
        pipe.SendActivation: _exec_send_activations,
        pipe.RecvActivation: _exec_recv_activations,
        pipe.SendGrad: _exec_send_grads,
        pipe.RecvGrad: _exec_recv_grads,
    }


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
