"""Training of direct super-resolution: its own attention and positions, on a frozen base."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megavideo.config.schema import ModelConfig
from megavideo.data.trainer_file import load_trainer, save_trainer, warm_cosine
from megavideo.superres.config import DirectConfig
from megavideo.superres.model import DirectSuperResolution
from megavideo.superres.pairs import Pairs

SHARED = (
    "hidden", "heads", "layers", "vocab_size", "image_codes", "begin_of_image", "position_rows",
    "norm_eps",
)  # fmt: skip
PUBLISHED_SLOTS = 96
FACTOR = 3  # fine tokens per coarse token and axis


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
    """Over all fine tokens: mean cross-entropy in nats, share of tokens whose likeliest is right.

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


def direct_config(model: ModelConfig, text_slots: int | None = None) -> DirectConfig:
    """Super-resolution by three of the frames of text-to-video model `model`.

    Args:
        text_slots: by default as many as published, or as the model has positions for.
    Raises: ValueError if the model's position table ends too early.
    """
    return DirectConfig(
        **{name: getattr(model, name) for name in SHARED},
        text_slots=text_slots or min(PUBLISHED_SLOTS, model.image_position),
        coarse_side=model.side,
        # A base's slot p holds token p-1, so token p stands where slot p+1 does.
        coarse_position=model.image_position + 1,
        fine_side=FACTOR * model.side,
    )


def new_model(config: DirectConfig, base: Mapping[str, Tensor]) -> DirectSuperResolution:
    """A model to train: the base, frozen; its attention copied; its positions tiled 3 x 3.

    Raises: ValueError if `base` is not the base of this configuration.
    """
    with torch.device("meta"):
        model = DirectSuperResolution(config)
    own = {name for name, _ in model.named_parameters() if is_trained(name)}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    wrong = [n for n in shapes.keys() - own if n not in base or base[n].shape != shapes[n]]
    if wrong or base.keys() - shapes.keys():
        odd = sorted(wrong) or sorted(base.keys() - shapes.keys())
        raise ValueError(f"the base does not fit this model: {odd[0]} is missing or differs")
    fresh = {name: _initial(name, base, config) for name in own}
    model.load_state_dict({**base, **fresh}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in own)
    return model


def is_trained(name: str) -> bool:
    """Whether super-resolution trains the parameter `name`; all others are the base's."""
    return ".attention.fine." in name or name == "embedding.fine_position"


def _initial(name: str, base: Mapping[str, Tensor], config: DirectConfig) -> Tensor:
    """As CogView2's starts: a copy of the base's attention; a frame's positions, 3 x 3 times."""
    if name != "embedding.fine_position":
        return base[name.replace(".fine.", ".spatial.")].clone()
    first = config.coarse_position - 1
    frame = base["embedding.position"][first : first + config.coarse_tokens]
    square = frame.unflatten(0, (config.coarse_side, config.coarse_side))
    return square.repeat(config.factor, config.factor, 1).flatten(0, 1)


class DirectTrainer:
    """Model, optimizer and step count; everything else of a step is a function of (seed, step)."""

    def __init__(self, model: DirectSuperResolution, training: Training, device: torch.device):
        self.model = model.to(device)
        self.training = training
        self.device = device
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), betas=(0.9, 0.95), weight_decay=1e-4
        )
        self.step = 0

    def train(self, pairs: Pairs, after_step: Callable[[float], None] = lambda _: None) -> None:
        """Train until `training.steps`. Raises ValueError if the loss is not finite."""
        while self.step < self.training.steps:
            rng = np.random.default_rng([self.training.seed, self.step])
            loss = self._train_step(pairs, rng.integers(len(pairs), size=self.training.batch))
            if not math.isfinite(loss):
                raise ValueError(
                    f"step {self.step}: the loss is {loss}; use a lower --learning-rate than "
                    f"{self.training.learning_rate}"
                )
            self.step += 1
            after_step(loss)

    def _train_step(self, pairs: Pairs, rows: np.ndarray) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate(self.step)
        logits, fine = self._logits(pairs, rows)
        loss = F.cross_entropy(logits.flatten(0, 1), fine.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.training.gradient_norm)
        self.optimizer.step()
        return loss.item()

    def _logits(self, pairs: Pairs, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Logits [B, M, codes] and what they should say, [B, M]."""
        made = pairs.batch(rows, self.model.config.text_slots)
        text, text_length, coarse, fine = (tensor.to(self.device) for tensor in made)
        return self.model.logits(self.model(text, text_length, coarse)), fine

    @torch.no_grad()
    def evaluate(self, pairs: Pairs) -> Score:
        """Loss and accuracy on all of `pairs`."""
        loss, right = 0.0, 0
        for rows in np.array_split(np.arange(len(pairs)), -(-len(pairs) // self.training.batch)):
            logits, fine = self._logits(pairs, rows)
            loss += float(F.cross_entropy(logits.flatten(0, 1), fine.flatten(), reduction="sum"))
            right += int((logits.argmax(-1) == fine).sum())
        total = pairs.fine.size
        return Score(loss / total, right / total, np.bincount(pairs.fine.flat).max() / total)

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs as one file."""
        save_trainer(path, self.trained, self.optimizer, self.step, self._settings())

    def resume(self, path: Path) -> None:
        """Continue from a file of `save`; ValueError if it belongs to other settings."""
        settings = self._settings()
        self.step = load_trainer(path, self.trained, self.optimizer, settings, self.device)

    def _settings(self) -> str:
        return json.dumps([self.model.config.model_dump(), asdict(self.training)])
