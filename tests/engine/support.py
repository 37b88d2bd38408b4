"""What the engine's tests share: a model of two layers, made-up batches, a golden reference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.schema import Config
from megavideo.data.batch import Batch
from megavideo.engine.engine import Engine
from megavideo.engine.snapshot import Saver
from megavideo.model.build import stage_grid
from megavideo.verify import golden, made_up
from tests.sizes import tiny

MODEL = tiny()
FINGERPRINT = "made-up data"


def save_checkpoint(
    engine: Engine, config: Config, data: str, tokenizers: TokenizerDigests | None = None
) -> None:
    """Save and wait for it. All ranks must call it."""
    saver = Saver(engine, config, data, tokenizers)
    saver.save()
    saved = saver.finish()
    if saved is not None and saved.problem is not None:
        raise OSError(saved.problem)


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


def batch_at(positions: range, frames: int = MODEL.frames) -> Batch:
    """The samples at `positions` as one batch."""
    return made_up.batch_at(MODEL, positions, frames)


def micro_batches(
    consumed: int, rank: int = 0, size: int = 1, micro_batch: int = 2, frames: int = MODEL.frames
) -> Iterator[Batch]:
    """A rank's endless micro-batches, cut from the global order as the loader cuts it."""
    return made_up.micro_batches(MODEL, frames, micro_batch, rank, size, consumed)


class Golden(golden.Golden):
    """The golden loop on made-up data."""

    def step(self, number: int) -> tuple[float, float]:
        """Train on the `number`-th global batch; its loss and gradient norm."""
        frames, size = stage_grid(MODEL, self.recipe.stage).frames, self.recipe.batch
        return super().step(batch_at(range(number * size, (number + 1) * size), frames))
