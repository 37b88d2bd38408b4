"""A model spread over pipeline stages, in the hands of DeepSpeed's pipeline engine."""

import math
import time
from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavideo.config.schema import Config
from megavideo.engine.home import Home, SeedDropout, Update, poisoned
from megavideo.engine.objective import Batch, Objective
from megavideo.engine.phases import Phases
from megavideo.engine.pipeline.execution import ExactPipelineEngine
from megavideo.engine.pipeline.interleaved import InterleavedPipelineEngine
from megavideo.engine.pipeline.module import PipelineLayers, new_pipeline_model
from megavideo.engine.quiet import hushed
from megavideo.engine.world import World

# What DeepSpeed's engine draws: the first layer's inputs, and the last one's labels.
Example = tuple[tuple[Tensor, Tensor, Tensor], Tensor]


class PipelineHome(Home):
    """Each rank holds some of the layers; the first and the last rank of a replica draw batches.

    An evaluated batch passes the stages alone: the next one waits.
    """

    module: PipelineLayers

    @classmethod
    def new_model(cls, config: Config, world: World) -> nn.Module:
        return new_pipeline_model(config, world)

    @classmethod
    def settle(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ) -> "PipelineHome":
        assert isinstance(model, PipelineLayers)
        objective = Objective(config.model, config.recipe, world.device, world.mesh)
        interleaves = config.parallel.virtual_stages > 1
        engine_class = InterleavedPipelineEngine if interleaves else ExactPipelineEngine
        with hushed():
            engine = engine_class(model, optimizer, config, world.mesh)
        return cls(engine, objective, world)

    def __init__(self, engine: ExactPipelineEngine, objective: Objective, world: World):
        self.module = engine.module
        self.optimizer = engine.basic_optimizer
        self.wrapper = engine.optimizer
        self.objective = objective
        self._engine = engine
        self._world = world
        self._losses = self._no_losses()
        self._waited = 0.0
        self.module.loss_fn = self._loss

    def train_batch(self, batches: Iterator[Batch], seed_dropout: SeedDropout) -> Update:
        self.module.before_forward = _Seeding(seed_dropout)
        self._losses, self._waited = self._no_losses(), 0.0
        self._engine.train_batch(self._examples(batches))
        losses = self._from_last_stage(self._losses / self._engine.gradient_accumulation_steps())
        norm = self._engine.grad_norm
        applied = math.isfinite(norm) and self._engine.was_step_applied()
        return Update(losses, norm, applied, self._waited)

    def frame_losses(self, batch: Batch) -> Tensor:
        self._losses = self._no_losses()
        self._engine.eval_batch(
            self._examples(iter([batch])),
            reduce_output=None,
            bcast_loss=False,
            num_micro_batches=1,
        )
        return self._from_last_stage(self._losses)

    def time_phases(self, phases: Phases) -> None:
        self._engine.time_instructions(phases)

    def _no_losses(self) -> Tensor:
        return torch.zeros(len(self.objective.frames), device=self._world.device)

    def _loss(self, logits: Tensor, image: Tensor) -> Tensor:
        """On the last stage: the loss of a micro-batch; its frame losses are added up aside."""
        losses = self.objective.losses(logits, image)
        self._losses += losses.detach()
        return poisoned(losses.mean())

    def _examples(self, batches: Iterator[Batch]) -> Iterator[Example]:
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self._waited += time.perf_counter() - started
            inputs = self.objective.inputs(batch)
            yield inputs, inputs[2]

    def _from_last_stage(self, losses: Tensor) -> Tensor:
        line = self._world.mesh.pp
        dist.broadcast(losses, src=line.ranks[-1], group=line.group)
        return losses


class _Seeding:
    """Seeds dropout before each forward: every run takes the micro-batches in their order."""

    def __init__(self, seed_dropout: SeedDropout):
        self._seed_dropout = seed_dropout
        self._done: Counter[int] = Counter()

    def __call__(self, run: int) -> None:
        self._seed_dropout(self._done[run], run)
        self._done[run] += 1
