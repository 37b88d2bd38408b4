"""One optimizer step: micro-batches, backward, the update, and what happened."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import xxhash
from torch import Tensor

from megavideo.checkpoint.manifest import Progress
from megavideo.config.schema import RecipeConfig
from megavideo.engine.frozen import FrozenWeights
from megavideo.engine.objective import Batch, Objective
from megavideo.engine.schedule import learning_rate
from megavideo.engine.state import OptimizerState
from megavideo.engine.world import World


@dataclass(frozen=True)
class StepResult:
    """What one step did, the same on every rank but for `data_wait_s`.

    Attributes:
        loss, frame_losses: means over the whole batch; not finite if any rank's was not.
        grad_norm: global L2 norm before clipping; not finite if the step was skipped.
        learning_rate: of this update.
        samples: over all ranks.
        skipped: loss or gradient was not finite: weights and optimizer state are untouched.
        loss_scale: fp16's dynamic scale; None in other precisions.
        data_wait_s: seconds this rank waited for batches.
    """

    loss: float
    frame_losses: tuple[float, ...]
    grad_norm: float
    learning_rate: float
    samples: int
    skipped: bool
    loss_scale: float | None
    data_wait_s: float

    @property
    def diverging(self) -> bool:
        """Skipped for another reason than fp16's search for its loss scale."""
        return not math.isfinite(self.loss) or (self.skipped and self.loss_scale is None)


class Engine:
    """A model in DeepSpeed's hands.

    Args:
        home: what `deepspeed.initialize` returned: reduces gradients, keeps the optimizer's state
            cut as its ZeRO stage says.
        objective: from a batch to the loss of each frame.
        state: the optimizer's state by canonical name, for checkpoints.
        frozen: the tripwire.
        progress: where the run stands.
    """

    def __init__(
        self,
        home: Any,
        objective: Objective,
        state: OptimizerState,
        frozen: FrozenWeights,
        recipe: RecipeConfig,
        world: World,
        progress: Progress,
    ):
        self._home = home
        self._objective = objective
        self._recipe = recipe
        self.world = world
        self.state = state
        self.frozen = frozen
        self.progress = progress

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler in fp16, else None."""
        return self._home.optimizer.loss_scaler if self._recipe.precision == "fp16" else None

    def train_batch(self, batches: Iterator[Batch]) -> StepResult:
        """Draw this rank's micro-batches of one global batch and make one optimizer step."""
        rate = self._set_learning_rate()
        self._home.train()
        steps = self._home.gradient_accumulation_steps()
        losses = torch.zeros(len(self._objective.frames), device=self.world.device)
        waited = 0.0
        for micro_step in range(steps):
            started = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - started
            self._home.set_gradient_accumulation_boundary(micro_step + 1 == steps)
            losses += self._backward(batch, micro_step) / steps
        norm, applied = self._update()
        self._advance(applied)
        return self._result(losses, norm, rate, not applied, waited)

    @property
    def loss_frames(self) -> Sequence[int]:
        """Numbers of the frames that carry loss."""
        return self._objective.frames

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and gradients, until the next `train_batch`."""
        self._home.eval()
        with torch.no_grad():
            yield

    def frame_losses(self, batch: Batch) -> Tensor:
        """This rank's mean loss of each loss-carrying frame, [loss frames]."""
        return self._objective(self._home, batch)

    def _backward(self, batch: Batch, micro_step: int) -> Tensor:
        """Add this micro-batch's gradient; returns its frame losses."""
        self._seed_dropout(micro_step)
        losses = self.frame_losses(batch)
        loss = losses.mean()
        # A loss that is not finite poisons its gradient on purpose (an infinite loss can have a
        # finite one). The reduction carries the NaN to all ranks, and an update whose gradient
        # norm is not finite is refused: so all agree, at any micro-batch and ZeRO stage, without
        # a collective of its own.
        self._home.backward(loss * torch.where(loss.isfinite(), 1.0, math.nan))
        return losses.detach()

    def _seed_dropout(self, micro_step: int) -> None:
        """Dropout is a function of the samples' global position: a resume needs no RNG state."""
        recipe, replicas = self._recipe, self.world.mesh.dp
        drawn = (micro_step * replicas.size + replicas.rank) * recipe.micro_batch
        position = self.progress.consumed_samples + drawn
        torch.manual_seed(xxhash.xxh3_64_intdigest(b"dropout %d" % position, recipe.seed))

    def _set_learning_rate(self) -> float:
        recipe = self._recipe
        count = self.progress.updates + 1
        rate = learning_rate(count, recipe.optimizer.lr, recipe.schedule)
        for group in self._home.basic_optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _update(self) -> tuple[float, bool]:
        """Step the optimizer: the gradient's norm before clipping, and whether it was applied."""
        if self._home.optimizer is self._home.basic_optimizer:
            # Without ZeRO, DeepSpeed steps the bare torch optimizer: clipping and checks are ours.
            norm = self._clip()
            self._home.step()
            return norm.item(), bool(norm.isfinite())
        self._home.step()
        return float(self._home.get_global_grad_norm()), self._home.was_step_applied()

    def _clip(self) -> Tensor:
        """Clip reduced gradients by their global norm, which is returned; drop what is not finite.

        An optimizer without gradients leaves weights and state alone.
        """
        trained = [p for p in self._home.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if not norm.isfinite():
            self._home.zero_grad()
        elif self._recipe.optimizer.clip:
            torch.nn.utils.clip_grads_with_norm_(trained, self._recipe.optimizer.clip, norm)
        return norm

    def _advance(self, applied: bool) -> None:
        progress = self.progress
        self.progress = replace(
            progress,
            step=progress.step + 1,
            updates=progress.updates + applied,
            consumed_samples=progress.consumed_samples + self._recipe.batch,
        )

    def _result(
        self, losses: Tensor, norm: float, rate: float, skipped: bool, waited: float
    ) -> StepResult:
        means = (self.world.total(losses) / self.world.mesh.dp.size).tolist()
        return StepResult(
            loss=sum(means) / len(means),
            frame_losses=tuple(means),
            grad_norm=norm,
            learning_rate=rate,
            samples=self._recipe.batch,
            skipped=skipped,
            loss_scale=self.loss_scaler.cur_scale if self.loss_scaler else None,
            data_wait_s=waited,
        )
