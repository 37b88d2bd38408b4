"""Training of super-resolution: a step, and the score on held-out frames.

A direct model learns all fine tokens of a frame from its coarse ones; an iterative one those that a
round masks, from the others.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megavideo.data.trainer_file import load_trainer, save_trainer, warm_cosine
from megavideo.superres.checkpoint import SuperResolution
from megavideo.superres.model import DirectSuperResolution
from megavideo.superres.pairs import Pairs
from megavideo.superres.upsample import TOP_K, round_mask


@dataclass(frozen=True)
class Training:
    """How to train: AdamW, linear warm-up over `warmup` of the steps, then a cosine to zero."""

    steps: int
    batch: int
    learning_rate: float
    seed: int
    warmup: float = 0.05
    gradient_norm: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * warm_cosine(step, self.steps, self.warmup)


class Score(NamedTuple):
    """Of predicted tokens: mean cross-entropy in nats, share of those whose likeliest is right.

    commonest: what always saying the most frequent code would get right.
    """

    loss: float
    accuracy: float
    commonest: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.3f}, {self.accuracy:.1%} of tokens right "
            f"({self.commonest:.1%} by the commonest code)"
        )


class Trainer:
    """Model, optimizer and step count; everything else of a step is a function of (seed, step)."""

    def __init__(self, model: SuperResolution, training: Training, device: torch.device):
        self.model = model.to(device)
        self.training = training
        self.device = device
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), betas=(0.9, 0.95), weight_decay=1e-4
        )
        self.step = 0
        rounds = 1 if isinstance(model, DirectSuperResolution) else len(TOP_K)
        self.rounds = range(1, rounds + 1)

    def train(self, pairs: Pairs, after_step: Callable[[float], None] = lambda _: None) -> None:
        """Train until `training.steps`. Raises ValueError if the loss is not finite."""
        while self.step < self.training.steps:
            rng = np.random.default_rng([self.training.seed, self.step])
            rows = rng.integers(len(pairs), size=self.training.batch)
            loss = self._train_step(pairs, rows, int(rng.choice(self.rounds)))
            if not math.isfinite(loss):
                raise ValueError(
                    f"step {self.step}: the loss is {loss}; use a lower --learning-rate than "
                    f"{self.training.learning_rate}"
                )
            self.step += 1
            after_step(loss)

    def _train_step(self, pairs: Pairs, rows: np.ndarray, round_number: int) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate(self.step)
        loss = F.cross_entropy(*self._predicted(pairs, rows, round_number))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.training.gradient_norm)
        self.optimizer.step()
        return loss.item()

    def _predicted(
        self, pairs: Pairs, rows: np.ndarray, round_number: int
    ) -> tuple[Tensor, Tensor]:
        """Logits [S, codes] of the slots that are predicted, and what they should say, [S]."""
        made = pairs.batch(rows, self.model.config.text_slots)
        text, text_length, coarse, fine = (tensor.to(self.device) for tensor in made)
        if isinstance(self.model, DirectSuperResolution):
            states, wanted = self.model(text, text_length, coarse), fine
        else:
            config = self.model.config
            unknown = round_mask(config.fine_side, round_number).to(self.device)
            masked = fine.masked_fill(unknown, config.begin_of_image)
            states, wanted = self.model(text, text_length, masked)[:, unknown], fine[:, unknown]
        return self.model.logits(states).flatten(0, 1), wanted.flatten()

    @torch.no_grad()
    def evaluate(self, pairs: Pairs) -> Score:
        """Loss and accuracy on all of `pairs`, in every round."""
        parts = np.array_split(np.arange(len(pairs)), -(-len(pairs) // self.training.batch))
        loss, right, counts = 0.0, 0, torch.zeros(self.model.config.image_codes)
        for rows, number in product(parts, self.rounds):
            logits, wanted = self._predicted(pairs, rows, number)
            loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(-1) == wanted).sum())
            counts += torch.bincount(wanted.cpu(), minlength=len(counts))
        total = int(counts.sum())
        return Score(loss / total, right / total, float(counts.max()) / total)

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs as one file."""
        save_trainer(path, self.trained, self.optimizer, self.step, self._settings())

    def resume(self, path: Path) -> None:
        """Continue from a file of `save`; ValueError if it belongs to other settings."""
        settings = self._settings()
        self.step = load_trainer(path, self.trained, self.optimizer, settings, self.device)

    def _settings(self) -> str:
        return json.dumps([self.model.config.model_dump(), asdict(self.training)])
