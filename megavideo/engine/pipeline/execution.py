"""DeepSpeed's pipeline engine, made exact where it is not."""

from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

from megavideo.config.deepspeed import deepspeed_config
from megavideo.config.schema import Config
from megavideo.engine.clip import clip_gradients
from megavideo.engine.phases import INSTRUCTION_PHASES, Phases
from megavideo.engine.pipeline.module import PipelineLayers
from megavideo.engine.quiet import deepspeed
from megavideo.parallel.mesh import Mesh


class ExactPipelineEngine(deepspeed.PipelineEngine):
    """Without ZeRO, DeepSpeed would clip each stage by its own norm; this clips by the whole one.

    Built directly: `deepspeed.initialize` knows no engine but its own.
    """

    def __init__(self, model: PipelineLayers, optimizer: Optimizer, config: Config, mesh: Mesh):
        self._mesh = mesh
        self._clip = config.recipe.optimizer.clip
        settings = deepspeed_config(config.recipe, config.parallel, mesh.dp.size)
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            mpu=model.mpu(),
            dist_init_required=False,
            config=settings,
            config_class=deepspeed.DeepSpeedConfig(settings, model.mpu()),
        )

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last step's gradient, before clipping."""
        return float(self._global_grad_norm)

    def time_instructions(self, phases: Phases) -> None:
        """Time each instruction of the schedule from now on.

        Stages then wait for each other before they reduce gradients: what those that are done early
        would wait for in the optimizer, at the norm, is part of the bubble.
        """
        timed = {
            kind: phases.timed(INSTRUCTION_PHASES[kind.__name__], function)
            for kind, function in self._INSTRUCTION_MAP.items()
        }
        reduce_kind = deepspeed.runtime.pipe.schedule.ReduceGrads
        wait = phases.timed("pipeline", lambda: dist.barrier(group=self._mesh.pp.group))
        reduce = timed[reduce_kind]

        def wait_and_reduce(engine: Any, **named: Any) -> None:
            wait()
            reduce(engine, **named)

        # Beside the class's own: other engines are not timed.
        own = {**timed, reduce_kind: wait_and_reduce}
        object.__setattr__(self, "_INSTRUCTION_MAP", own)
        phases.put_on(self, "_await", "pipeline")  # of interleaved runs: where messages are needed

    def _take_model_step(self, lr_kwargs: Any) -> None:
        if self.optimizer is self.basic_optimizer:
            norm = clip_gradients(self.module.parameters(), self._clip, self._mesh)
            self._global_grad_norm = norm
        super()._take_model_step(lr_kwargs)
