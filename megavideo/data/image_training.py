"""Training of the image tokenizer: a plain autoencoder first, then the codebook, then both.

The first steps train encoder and decoder without the quantiser. Then k-means places the codes on
what the encoder has learned to say, and from there on each step moves the codes to the running mean
of their vectors. On small data this reaches in a minute what random codes do not reach at all.

With pictures of several sizes, or several compression rates, steps take turns: one codebook serves
all, so that super-resolution can speak of a small and of a large picture in the same codes.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megavideo.data.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, images_of
from megavideo.data.trainer_file import load_trainer, save_trainer, warm_cosine

DEAD_SHARE = 0.03  # a code chosen less than this share of the mean is dead
REVIVE_EVERY = 10  # steps
SEED_FRAMES = 256  # whose vectors place the codebook
EVALUATION_BATCH = 64

# Frames uint8 [n, H, W, 3] of each size that is trained.
Pools = Sequence[np.ndarray]


@dataclass(frozen=True)
class ImageTraining:
    """How to train.

    steps: optimizer steps in all, each on pictures drawn by (seed, step).
    batch: whole frames per step, of the smallest size; larger ones fewer, to the same area.
    crop: the first steps see squares of this many pixels instead, as many as cover the same area.
        More different pictures per step, and normalisation over less background, so colours are
        learned in a third of the time. None: always whole frames.
    whole: share of the steps, at the end, that see whole frames.
    learning_rate: of AdamW at its highest; linear warm-up, then a cosine to zero.
    autoencoder: share of the steps before the codebook is placed.
    decay: of the codebook's running means, per step.
    commitment: weight of the distance between encoder output and codes.
    """

    steps: int
    batch: int
    learning_rate: float
    seed: int
    crop: int | None = None
    whole: float = 0.3
    autoencoder: float = 0.2
    warmup: float = 0.05
    decay: float = 0.98
    commitment: float = 0.25
    gradient_norm: float = 1.0

    @property
    def codebook_step(self) -> int:
        """The step at which the codes are placed."""
        return round(self.steps * self.autoencoder)

    def crop_at(self, step: int) -> int | None:
        """Side of the squares that a step sees, None for whole frames."""
        return self.crop if step < (1 - self.whole) * self.steps else None

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.learning_rate * warm_cosine(step, self.steps, self.warmup)


class Score(NamedTuple):
    """Quality on frames: PSNR in dB, perplexity of the codes, share of the codes that occur."""

    psnr: float
    perplexity: float
    used: float

    def __str__(self) -> str:
        return f"PSNR {self.psnr:.1f} dB, perplexity {self.perplexity:.0f}, {self.used:.0%} used"


class ImageTrainer:
    """Model, optimizer and step count; everything else of a step is a function of (seed, step).

    All of `config.rates` are trained.
    """

    def __init__(self, config: ImageTokenizerConfig, training: ImageTraining, device: torch.device):
        self.training = training
        self.device = device
        torch.manual_seed(training.seed)
        # 15-40 % faster on a CPU with AVX-512, and what tensor cores want.
        self.model = ImageTokenizer(config).to(device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95), weight_decay=1e-4)
        self.step = 0

    def train(
        self, pools: Pools, after_step: Callable[[float, Score], None] = lambda *_: None
    ) -> None:
        """Train on frames uint8 [n, H, W, 3] of each size until `training.steps`.

        Calls `after_step(loss, score of the batch)`. Raises ValueError if the loss is not finite.
        """
        turns = [(pool, rate) for rate in self.model.config.rates for pool in range(len(pools))]
        while self.step < self.training.steps:
            if self.step == self.training.codebook_step:
                self._place_codes(pools, turns)
            pool, rate = turns[self.step % len(turns)]
            loss, score = self._train_step(self._batch(pools, pool), rate)
            if not math.isfinite(loss):
                raise ValueError(
                    f"step {self.step}: the loss is {loss}; use a lower --learning-rate than "
                    f"{self.training.learning_rate}"
                )
            self.step += 1
            after_step(loss, score)

    def _batch(self, pools: Pools, pool: int, count: int | None = None) -> Tensor:
        """`count` (by default `training.batch`) random frames, or random squares of equal area."""
        frames = pools[pool]
        rng = np.random.default_rng([self.training.seed, self.step])
        area = min(other[0, :, :, 0].size for other in pools)
        count = max(1, (count or self.training.batch) * area // frames[0, :, :, 0].size)
        crop = self.training.crop_at(self.step)
        if crop is None:
            return self._images(frames[rng.integers(len(frames), size=count)])
        height, width = frames.shape[1:3]
        count *= height * width // crop**2
        chosen = rng.integers(len(frames), size=count)
        tops = rng.integers(height - crop + 1, size=count)
        lefts = rng.integers(width - crop + 1, size=count)
        squares = [
            frames[number, top : top + crop, left : left + crop]
            for number, top, left in zip(chosen, tops, lefts, strict=True)
        ]
        return self._images(np.stack(squares))

    def _images(self, frames: np.ndarray) -> Tensor:
        return images_of(frames).to(self.device, memory_format=torch.channels_last)

    def _generator(self) -> torch.Generator:
        seed = np.random.default_rng([self.training.seed, self.step, 1]).integers(2**62)
        return torch.Generator().manual_seed(int(seed))

    def _train_step(self, images: Tensor, rate: int) -> tuple[float, Score]:
        training, quantise = self.training, self.step >= self.training.codebook_step
        for group in self.optimizer.param_groups:
            group["lr"] = training.rate(self.step)
        result = self.model(images, quantise, rate)
        loss = result.reconstruction_loss
        if quantise:
            loss = loss + training.commitment * result.commitment_loss
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.gradient_norm)
        self.optimizer.step()
        if quantise:
            self._move_codes(result.vectors, result.indices)
        error = (result.images - images).pow(2).mean()
        return loss.item(), _score(error, result.indices, self.model.num_codes)

    def _move_codes(self, vectors: Tensor, indices: Tensor) -> None:
        quantizer = self.model.quantize
        quantizer.update(vectors, indices, self.training.decay)
        # Not at the end: a code that has just moved must still be learned by the decoder.
        if self.step % REVIVE_EVERY == 0 and self.step < 0.8 * self.training.steps:
            fewest = DEAD_SHARE * len(indices) / self.model.num_codes
            quantizer.revive(vectors, fewest, self._generator())

    @torch.no_grad()
    def _place_codes(self, pools: Pools, turns: Sequence[tuple[int, int]]) -> None:
        vectors = [
            self.model(self._batch(pools, pool, SEED_FRAMES), quantise=False, rate=rate).vectors
            for pool, rate in turns
        ]
        self.model.quantize.seed(torch.cat(vectors), self._generator())

    @torch.no_grad()
    def evaluate(self, frames: np.ndarray, rate: int | None = None) -> Score:
        """Score of the tokens of `frames` uint8 [n, H, W, 3] and of what they decode to."""
        errors, indices = [], []
        for start in range(0, len(frames), EVALUATION_BATCH):
            images = self._images(frames[start : start + EVALUATION_BATCH])
            tokens = self.model.encode(images, rate)
            errors.append((self.model.decode(tokens, rate) - images).pow(2).mean((1, 2, 3)))
            indices.append(tokens.flatten())
        return _score(torch.cat(errors).mean(), torch.cat(indices), self.model.num_codes)

    def save(self, path: Path) -> None:
        """Write everything that `resume` needs as one file."""
        save_trainer(path, self.model.state_dict(), self.optimizer, self.step, self._settings())

    def resume(self, path: Path) -> None:
        """Continue from a file of `save`; ValueError if it belongs to other settings."""
        weights, settings = self.model.state_dict(), self._settings()
        self.step = load_trainer(path, weights, self.optimizer, settings, self.device)

    def _settings(self) -> str:
        return json.dumps([asdict(self.model.config), asdict(self.training)])


def _score(mean_square: Tensor, indices: Tensor, num_codes: int) -> Score:
    counts = torch.bincount(indices, minlength=num_codes)
    shares = counts / counts.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return Score(
        psnr=float(-10 * torch.log10(mean_square.clamp_min(1e-10))),
        perplexity=float(entropy.exp()),
        used=float((counts > 0).float().mean()),
    )
