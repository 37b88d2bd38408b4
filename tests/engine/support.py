"""What the engine's tests share: a model of two layers, made-up batches, a golden reference."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megavideo.config.schema import Config, ModelConfig
from megavideo.engine.objective import Objective
from megavideo.engine.schedule import learning_rate
from megavideo.engine.weights import new_model, start_weights
from megavideo.model.build import canonical_parameters, stage_grid

MODEL = ModelConfig(
    hidden=16,
    heads=2,
    layers=2,
    text_slots=4,
    frames=3,
    side=2,
    vocab_size=40,
    image_codes=20,
    pad=23,
    newline=24,
    begin_of_image=39,
    position_rows=16,
    image_position=8,
    frame_position_rows=12,
)
FINGERPRINT = "made-up data"


@dataclass(frozen=True)
class MadeUpBatch:
    """A batch of the loader's shape."""

    text: Tensor
    text_length: Tensor
    image: Tensor


def config(
    folder: Path,
    recipe: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Config:
    """A keyframes run of eight samples a step in micro-batches of two, overridden as asked."""
    return Config.model_validate(
        {
            "model": MODEL,
            "recipe": {
                "stage": "keyframes",
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
                "steps": 20,
                "batch": 8,
                "micro_batch": 2,
                "precision": "fp32",
                "schedule": {"hold_steps": 0, "horizon": 100, "warmup": 0.0},
                "optimizer": {"lr": 1e-2, "clip": 0.0, **(optimizer or {})},
                **(recipe or {}),
            },
            "parallel": {"zero": 1, "reduce_bucket": 4096, **(parallel or {})},
            "data": {"train": "nowhere", "text_tokenizer": "nowhere"},
            "run": {"directory": str(folder)},
            **sections,
        }
    )


def sample(position: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sample at a global position: a function of nothing else."""
    generator = torch.Generator().manual_seed(position)
    text = torch.randint(25, 39, (MODEL.text_slots,), generator=generator)
    length = torch.randint(1, MODEL.text_slots + 1, (), generator=generator)
    shape = (frames, MODEL.grid.tokens_per_frame)
    return text, length, torch.randint(0, MODEL.image_codes, shape, generator=generator)


def batch_at(positions: range, frames: int = MODEL.frames) -> MadeUpBatch:
    """The samples at `positions` as one batch."""
    samples = (sample(position, frames) for position in positions)
    return MadeUpBatch(*(torch.stack(part) for part in zip(*samples, strict=True)))


def micro_batches(
    consumed: int, rank: int = 0, size: int = 1, micro_batch: int = 2, frames: int = MODEL.frames
) -> Iterator[MadeUpBatch]:
    """A rank's endless micro-batches, cut from the global order as the loader cuts it."""
    while True:
        start = consumed + rank * micro_batch
        yield batch_at(range(start, start + micro_batch), frames)
        consumed += size * micro_batch


class Golden:
    """The same training in a plain loop of one process: whole batch, torch's optimizer."""

    def __init__(self, config: Config):
        self.config = config
        self.model = new_model(config, torch.device("cpu"))
        self.parameters = canonical_parameters(self.model)
        start_weights(self.parameters, config)
        self.objective = Objective(config.model, config.recipe, torch.device("cpu"))
        self.trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        self.optimizer = self._optimizer()

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.config.recipe.optimizer
        biases = [p for n, p in self.trained.items() if n.endswith((".bias", "norm.weight"))]
        others = [p for n, p in self.trained.items() if not n.endswith((".bias", "norm.weight"))]
        groups = [{"params": others}, {"params": biases, "weight_decay": 0.0}]
        if settings.name == "sgd":
            return torch.optim.SGD(groups, weight_decay=settings.weight_decay)
        return torch.optim.AdamW(
            groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )

    def step(self, number: int) -> tuple[float, float]:
        """Train on the `number`-th global batch; its loss and gradient norm."""
        recipe = self.config.recipe
        frames = stage_grid(MODEL, recipe.stage).frames
        batch = batch_at(range(number * recipe.batch, (number + 1) * recipe.batch), frames)
        loss = self.objective(self.model, batch).mean()
        loss.backward()
        clip = recipe.optimizer.clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.trained.values(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number + 1, recipe.optimizer.lr, recipe.schedule)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def weights(self) -> dict[str, Tensor]:
        """What training changed, copied."""
        return {name: p.detach().clone() for name, p in self.trained.items()}
