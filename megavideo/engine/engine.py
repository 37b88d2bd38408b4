"""One optimizer step: micro-batches, backward, the update, and what happened."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megavideo.checkpoint.manifest import Progress
from megavideo.config.schema import RecipeConfig
from megavideo.engine.dropout import seed_dropout
from megavideo.engine.frozen import FrozenWeights
from megavideo.engine.home import Home, Update
from megavideo.engine.objective import Batch
from megavideo.engine.phases import Phases
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
        """Skipped for another reason than fp16's search for its loss scale, which ends at 1."""
        searching = self.loss_scale is not None and self.loss_scale > 1
        return not math.isfinite(self.loss) or (self.skipped and not searching)


class Engine:
    """A run's model in training, wherever DeepSpeed keeps its layers.

    Args:
        home: holds the layers, their gradients and the optimizer.
        loss_frames: numbers of the frames that carry loss.
        state: the optimizer's state by canonical name, for checkpoints.
        frozen: the tripwire.
        progress: where the run stands.
    """

    def __init__(
        self,
        home: Home,
        loss_frames: Sequence[int],
        state: OptimizerState,
        frozen: FrozenWeights,
        recipe: RecipeConfig,
        world: World,
        progress: Progress,
    ):
        self._home = home
        self._recipe = recipe
        self.loss_frames = loss_frames
        self.world = world
        self.state = state
        self.frozen = frozen
        self.progress = progress
        if self.loss_scaler:  # steps that are skipped at the lowest scale are counted, as others
            self.loss_scaler.raise_error_at_min_scale = False

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's dynamic loss scaler in fp16, else None."""
        return self._home.wrapper.loss_scaler if self._recipe.precision == "fp16" else None

    def train_batch(self, batches: Iterator[Batch]) -> StepResult:
        """Draw this rank's micro-batches of one global batch and make one optimizer step."""
        rate = self._set_learning_rate()
        update = self._home.train_batch(batches, self._seed_dropout)
        self._advance(update.applied)
        return self._result(update, rate)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout and gradients, until the next `train_batch`."""
        self._home.module.eval()
        with torch.no_grad():
            yield

    def frame_losses(self, batch: Batch) -> Tensor:
        """This replica's mean loss of each loss-carrying frame, [loss frames]."""
        return self._home.frame_losses(batch)

    @property
    def module(self) -> nn.Module:
        """The layers that this rank holds."""
        return self._home.module

    def time_phases(self, phases: Phases) -> None:
        """From now on, time the phases of each step; there is no way back."""
        self._home.time_phases(phases)

    def _seed_dropout(self, micro_step: int, run: int = 0) -> None:
        consumed = self.progress.consumed_samples
        seed_dropout(self._recipe, self.world.mesh, consumed, micro_step, run)

    def _set_learning_rate(self) -> float:
        recipe = self._recipe
        count = self.progress.updates + 1
        rate = learning_rate(count, recipe.optimizer.lr, recipe.schedule)
        for group in self._home.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _advance(self, applied: bool) -> None:
        progress = self.progress
        self.progress = replace(
            progress,
            step=progress.step + 1,
            updates=progress.updates + applied,
            consumed_samples=progress.consumed_samples + self._recipe.batch,
        )

    def _result(self, update: Update, rate: float) -> StepResult:
        means = (self.world.total(update.frame_losses) / self.world.mesh.dp.size).tolist()
        return StepResult(
            loss=sum(means) / len(means),
            frame_losses=tuple(means),
            grad_norm=update.grad_norm,
            learning_rate=rate,
            samples=self._recipe.batch,
            skipped=not update.applied,
            loss_scale=self.loss_scaler.cur_scale if self.loss_scaler else None,
            data_wait_s=update.data_wait_s,
        )
