"""Where DeepSpeed keeps the layers: what the engine asks of every such place, and the plain one."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megavideo.config.deepspeed import deepspeed_config
from megavideo.config.schema import Config
from megavideo.engine.clip import clip_gradients
from megavideo.engine.mpu import ModelParallelUnit
from megavideo.engine.objective import Batch, Objective
from megavideo.engine.phases import Phases
from megavideo.engine.quiet import deepspeed, hushed
from megavideo.engine.weights import new_model
from megavideo.engine.world import World


class SeedDropout(Protocol):
    """Called with the numbers of a micro-batch and of a run of layers before dropout is drawn."""

    def __call__(self, micro_step: int, run: int = 0) -> None: ...


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    Attributes:
        frame_losses: means over this replica's micro-batches, the same on all of its ranks.
        grad_norm: global L2 norm before clipping.
        applied: whether weights and optimizer state changed: loss and gradient were finite.
        data_wait_s: seconds this rank waited for batches.
    """

    frame_losses: Tensor
    grad_norm: float
    applied: bool
    data_wait_s: float


class Home(ABC):
    """A model in DeepSpeed's hands: it reduces gradients and keeps the optimizer's state.

    Attributes:
        module: the layers that this rank holds.
        optimizer: torch's optimizer.
        wrapper: DeepSpeed's around it; the same object with ZeRO 0.
        objective: from a batch to the loss of each frame.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    wrapper: Any
    objective: Objective

    @classmethod
    @abstractmethod
    def new_model(cls, config: Config, world: World) -> nn.Module:
        """The layers that this rank will hold, on its device, values not set yet."""

    @classmethod
    @abstractmethod
    def settle(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ) -> "Home":
        """Hand `model`, its values set, to DeepSpeed. All ranks must call it."""

    @abstractmethod
    def train_batch(self, batches: Iterator[Batch], seed_dropout: SeedDropout) -> Update:
        """Draw this rank's micro-batches of one global batch and make one optimizer step."""

    @abstractmethod
    def frame_losses(self, batch: Batch) -> Tensor:
        """Mean loss of each loss-carrying frame, on every rank of the replica."""

    @abstractmethod
    def time_phases(self, phases: Phases) -> None:
        """From now on, time the phases of each step; there is no way back."""


class SingleStageHome(Home):
    """All layers on every rank, or its parts of them, in `deepspeed.initialize`'s engine.

    Args:
        clip: largest global gradient norm where clipping is ours (ZeRO 0); 0 does not clip.
    """

    @classmethod
    def new_model(cls, config: Config, world: World) -> nn.Module:
        return new_model(config, world.device, world.mesh)

    @classmethod
    def settle(
        cls, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, world: World
    ) -> "SingleStageHome":
        with hushed():
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=deepspeed_config(config.recipe, config.parallel, world.mesh.dp.size),
                mpu=ModelParallelUnit(world.mesh),
                dist_init_required=False,
            )
        objective = Objective(config.model, config.recipe, world.device, world.mesh)
        return cls(engine, objective, config.recipe.optimizer.clip, world)

    def __init__(self, engine: Any, objective: Objective, clip: float, world: World):
        self.module = engine.module
        self.optimizer = engine.basic_optimizer
        self.wrapper = engine.optimizer
        self.objective = objective
        self._engine = engine
        self._clip = clip
        self._world = world

    def train_batch(self, batches: Iterator[Batch], seed_dropout: SeedDropout) -> Update:
        self.module.train()
        steps = self._engine.gradient_accumulation_steps()
        losses = torch.zeros(len(self.objective.frames), device=self._world.device)
        waited = 0.0
        for micro_step in range(steps):
            started = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - started
            self._engine.set_gradient_accumulation_boundary(micro_step + 1 == steps)
            seed_dropout(micro_step)
            losses += self._backward(batch) / steps
        norm, applied = self._step()
        return Update(losses, norm, applied, waited)

    def frame_losses(self, batch: Batch) -> Tensor:
        return self.objective(self._engine, batch)

    def time_phases(self, phases: Phases) -> None:
        phases.put_on(self, "frame_losses", "forward")
        phases.put_on(self, "_step", "optimizer")
        phases.put_on(self._engine, "backward", "backward")
        phases.put_on_reduction(self._engine)

    def _backward(self, batch: Batch) -> Tensor:
        """Add this micro-batch's gradient; returns its frame losses."""
        losses = self.frame_losses(batch)
        self._engine.backward(poisoned(losses.mean()))
        return losses.detach()

    def _step(self) -> tuple[float, bool]:
        """Step the optimizer: the gradient's norm before clipping, and whether it was applied."""
        if self.wrapper is self.optimizer:
            # Without ZeRO, DeepSpeed steps the bare torch optimizer: clipping and checks are ours.
            norm = clip_gradients(self.module.parameters(), self._clip, self._world.mesh)
            self._engine.step()
            return norm.item(), bool(norm.isfinite())
        self._engine.step()
        return float(self._engine.get_global_grad_norm()), self._engine.was_step_applied()


def poisoned(loss: Tensor) -> Tensor:
    """`loss`, or NaN with a NaN gradient if it is not finite (an infinite loss can have a finite
    one).

    The reduction carries the NaN to all ranks, and an update whose gradient norm is not finite is
    refused: so all agree, at any micro-batch and ZeRO stage, without a collective of its own.
    """
    return loss * torch.where(loss.isfinite(), 1.0, math.nan)
