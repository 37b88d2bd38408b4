"""Where the seconds of a training step go: a stopwatch that engines can be put on, for measuring.

Each reading waits for the device, so what would overlap (a reduction behind a backward pass) is
timed one after the other: phases are for shares, not for the length of a step.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# DeepSpeed's instructions -> phases; what waits for another stage, or sends to it, is "pipeline".
INSTRUCTION_PHASES = {
    "LoadMicroBatch": "data",
    "ForwardPass": "forward",
    "BackwardPass": "backward",
    "ReduceGrads": "reduction",
    "ReduceTiedGrads": "reduction",
    "OptimizerStep": "optimizer",
    "SendActivation": "pipeline",
    "RecvActivation": "pipeline",
    "SendGrad": "pipeline",
    "RecvGrad": "pipeline",
}
# Where DeepSpeed's optimizers reduce gradients during a backward pass: ZeRO 1 and 2, and ZeRO 3.
REDUCING = ("reduce_ipg_grads", "_DeepSpeedZeroOptimizer_Stage3__reduce_and_partition_ipg_grads")


class Phases:
    """Seconds by phase; time of a phase inside another counts for the inner one only."""

    def __init__(self, device: torch.device):
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._on_gpu = device.type == "cuda"
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is done here."""
        self._read()
        self._open.append(name)
        try:
            yield
        finally:
            self._read()
            self._open.pop()

    def _read(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, each call timed."""

        def call(*arguments: Any, **named: Any) -> Any:
            with self(name):
                return function(*arguments, **named)

        return call

    def put_on(self, owner: Any, method: str, name: str) -> None:
        """Time `owner.method` from now on, if there is one."""
        if hasattr(owner, method):
            setattr(owner, method, self.timed(name, getattr(owner, method)))

    def put_on_reduction(self, engine: Any) -> None:
        """Time what a DeepSpeed engine and its optimizer do to reduce gradients over replicas."""
        self.put_on(engine, "allreduce_gradients", "reduction")
        for method in REDUCING:
            self.put_on(engine.optimizer, method, "reduction")
