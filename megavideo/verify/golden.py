"""The same training in a plain loop of one process: what every parallel layout must equal.

No DeepSpeed, no accumulation: the whole batch at once, torch's own optimizer and clipping.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megavideo.config.schema import Config
from megavideo.engine.objective import Batch, Objective
from megavideo.engine.optimizer import decays
from megavideo.engine.schedule import learning_rate
from megavideo.engine.weights import new_model, start_weights
from megavideo.model.build import canonical_parameters


class Golden:
    """A model with the configuration's starting weights, and its optimizer."""

    def __init__(self, config: Config):
        cpu = torch.device("cpu")
        self.recipe = config.recipe
        self.model = new_model(config, cpu).float()  # whatever the layout's precision
        self.parameters = canonical_parameters(self.model)
        start_weights(self.model, config)
        self.objective = Objective(config.model, config.recipe, cpu)
        self.trained = {n: p for n, p in self.parameters.items() if p.requires_grad}
        self.optimizer = self._optimizer()
        self.steps = 0

    def step(self, batch: Batch) -> tuple[float, float]:
        """Train on one global batch; its loss, and its gradient's norm before clipping."""
        settings = self.recipe.optimizer
        loss = self.objective(self.model, batch).mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained.values(), settings.clip or float("inf"))
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps, settings.lr, self.recipe.schedule)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def weights(self) -> dict[str, Tensor]:
        """What training changes, copied."""
        return {name: p.detach().clone() for name, p in self.trained.items()}

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.recipe.optimizer
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in self.trained.items() if decays(n)]},
            {"params": [p for n, p in self.trained.items() if not decays(n)], "weight_decay": 0.0},
        ]
        if settings.name == "sgd":
            return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        return torch.optim.AdamW(
            groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
        )
