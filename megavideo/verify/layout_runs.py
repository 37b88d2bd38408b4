"""A few steps of training in one process and in a parallel layout, and how far apart they end.

All start from the same weights and draw the same global batches, so whatever differs is the
layout's doing. Dropout is off: its masks differ between layouts on purpose.
"""

import json
import logging
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megavideo.config.layout_names import Layout
from megavideo.config.schema import Config
from megavideo.engine.build import build_engine
from megavideo.engine.launch import run_world
from megavideo.engine.world import join_world
from megavideo.log import setup_logging
from megavideo.model.build import stage_grid
from megavideo.verify.golden import Golden
from megavideo.verify.made_up import batch_at, micro_batches

# SGD without clipping shows a wrong scale of any gradient; AdamW and clipping, which hide scales,
# show mistakes of their own. Adam's epsilon is large: with 1e-8 an element whose gradient is
# rounding noise moves by a full step in a random direction.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd", "lr": 1.0, "weight_decay": 0.0},
    "adamw": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3},
}


@dataclass(frozen=True)
class Case:
    """One training: an optimizer and the largest gradient norm (0: none)."""

    optimizer: str
    clip: float

    @property
    def name(self) -> str:
        """As `adamw, clipped`."""
        return f"{self.optimizer}, clipped" if self.clip else self.optimizer


@dataclass(frozen=True)
class Trace:
    """What a training did: loss and gradient norm of each step, and every parameter's update."""

    losses: list[float]
    norms: list[float]
    updates: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """How far a layout's training is from that of one process; `parameter` has the worst update.

    Attributes:
        loss: largest absolute difference.
        norm: largest relative difference.
        update: largest difference in a parameter's update, relative to its largest element.
    """

    loss: float
    norm: float
    update: float
    parameter: str


def golden_traces(config: Config, steps: int) -> dict[Case, Trace]:
    """Each optimizer without clipping, and clipped to half of the first step's norm."""
    traces = {}
    for optimizer in OPTIMIZERS:
        free = Case(optimizer, 0.0)
        traces[free] = _golden(variant(config, {}, free), steps)
        clipped = Case(optimizer, traces[free].norms[0] / 2)
        traces[clipped] = _golden(variant(config, {}, clipped), steps)
    return traces


def layout_traces(
    config: Config, layout: Layout, cases: list[Case], steps: int, deadline_s: float
) -> dict[Case, Trace]:
    """Train every case in one world of `layout`.

    Raises:
        ValueError: if the configuration refuses the layout.
        RunFailed: if a process failed, or `deadline_s` passed.
    """
    configs = [variant(config, layout.settings, case) for case in cases]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_world(_train_all, layout.world_size, configs, folder, steps, deadline_s=deadline_s)
        return {case: _read(folder / str(number)) for number, case in enumerate(cases)}


def compare(trace: Trace, golden: Trace) -> Difference:
    """Differences between two trainings; a missing parameter is an infinite one."""
    updates = {name: _relative(trace.updates.get(name), u) for name, u in golden.updates.items()}
    parameter = max(updates, key=lambda name: _rank(updates[name]))
    return Difference(
        max((abs(a - b) for a, b in zip(trace.losses, golden.losses, strict=True)), key=_rank),
        max((abs(a / b - 1) for a, b in zip(trace.norms, golden.norms, strict=True)), key=_rank),
        updates[parameter],
        parameter,
    )


def variant(config: Config, parallel: Mapping[str, Any], case: Case) -> Config:
    """`config` without dropout and schedule, in a layout, with a case's optimizer.

    Raises: ValueError if the layout is refused.
    """
    tree = config.model_dump(mode="json")
    tree["recipe"] |= {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "optimizer": {**OPTIMIZERS[case.optimizer], "clip": case.clip},
        "schedule": {"hold_steps": 0, "warmup": 0.0},
    }
    tree["parallel"] |= parallel
    # Through JSON, because strict validation of Python objects refuses a list for a tuple.
    return Config.model_validate_json(json.dumps(tree))


def _golden(config: Config, steps: int) -> Trace:
    golden, size = Golden(config), config.recipe.batch
    frames = stage_grid(config.model, config.recipe.stage).frames
    start = golden.weights()
    results = [
        golden.step(batch_at(config.model, range(step * size, (step + 1) * size), frames))
        for step in range(steps)
    ]
    losses, norms = (list(column) for column in zip(*results, strict=True))
    return Trace(losses, norms, _updates(golden.weights(), start))


def _train_all(rank: int, configs: list[Config], folder: Path, steps: int) -> None:
    setup_logging(logging.ERROR)
    world = join_world(timeout_minutes=30.0, parallel=configs[0].parallel)
    for number, config in enumerate(configs):
        run = folder / str(number)
        settings = config.model_copy(
            update={"run": config.run.model_copy(update={"directory": str(run)})}
        )
        engine = build_engine(settings, world, "made-up data")
        start = engine.state.gather_weights()
        replica, recipe = world.mesh.dp, config.recipe
        frames = stage_grid(config.model, recipe.stage).frames
        batches = micro_batches(
            config.model, frames, recipe.micro_batch, replica.rank, replica.size
        )
        results = [engine.train_batch(batches) for _ in range(steps)]
        updates = _updates(engine.state.gather_weights(), start)
        if rank == 0:
            losses, norms = [r.loss for r in results], [r.grad_norm for r in results]
            _write(run, Trace(losses, norms, updates))


def _updates(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight - before[name] for name, weight in after.items()}


def _write(run: Path, trace: Trace) -> None:
    run.mkdir(exist_ok=True)
    save_file(trace.updates, run / "updates.safetensors")
    (run / "steps.json").write_text(json.dumps({"losses": trace.losses, "norms": trace.norms}))


def _read(run: Path) -> Trace:
    steps = json.loads((run / "steps.json").read_text())
    return Trace(**steps, updates=load_file(run / "updates.safetensors"))


def _rank(error: float) -> float:
    """For `max`, which else passes over NaN: nothing is worse."""
    return math.inf if math.isnan(error) else error


def _relative(ours: Tensor | None, golden: Tensor) -> float:
    if ours is None or ours.shape != golden.shape:
        return float("inf")
    error, size = (ours - golden).abs().max().item(), golden.abs().max().item()
    assert size > 0, "a trainable parameter did not move: this training compares nothing"
    return error / size
