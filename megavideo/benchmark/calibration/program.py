"""Time that programs take around the arithmetic: steps of a model too small to compute anything."""

from pathlib import Path
from statistics import median

import torch
from torch import nn

from megavideo.benchmark.calibration.clock import now
from megavideo.config.schema import Config, ModelConfig
from megavideo.engine.build import build_engine
from megavideo.engine.objective import Objective
from megavideo.engine.world import World
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.trainable import mark_trainable
from megavideo.verify.made_up import batch_at, micro_batches

FEW, MANY = 2, 8


def measure_overhead(world: World, folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of a block forward and backward, a micro-batch, and an optimizer step.

    Args:
        folder: of the run that makes the steps, the same for all ranks.
    """
    few, many = (_passes(layers, world.device, rounds) for layers in (FEW, MANY))
    blocks = MANY - FEW
    forward, backward = ((many[i] - few[i]) / blocks for i in (0, 1))
    micro_batch = max(0.0, sum(few) - FEW * (forward + backward))
    step = max(0.0, _step(world, folder, rounds) - sum(few))
    milliseconds = {
        "layer_forward_ms": forward,
        "layer_backward_ms": backward,
        "micro_batch_ms": micro_batch,
        "step_ms": step,
    }
    return {name: max(0.0, 1e3 * seconds) for name, seconds in milliseconds.items()}


def _config(layers: int, folder: str, replicas: int = 1) -> Config:
    model = ModelConfig(
        hidden=16, heads=2, layers=layers, text_slots=4, frames=3, side=2, vocab_size=40,
        image_codes=20, pad=23, newline=24, begin_of_image=39, position_rows=16, image_position=8,
        frame_position_rows=12,
    )  # fmt: skip
    recipe = {"stage": "keyframes", "steps": 1, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    recipe |= {"batch": replicas, "micro_batch": 1, "precision": "fp32"}
    return Config.model_validate(
        {
            "model": model,
            "recipe": recipe,
            "parallel": {"zero": 1, "recompute": "none"},
            "data": {"train": "made-up", "text_tokenizer": "made-up"},
            "run": {"directory": folder},
        }
    )


def _passes(layers: int, device: torch.device, rounds: int) -> tuple[float, float]:
    """Median seconds of a forward pass with its loss, and of a backward pass."""
    config = _config(layers, "unused")
    model = build_model(config.model, config.recipe).to(device).train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    mark_trainable(canonical_parameters(model), "keyframes")
    objective = Objective(config.model, config.recipe, device)
    batch = batch_at(config.model, range(1), config.model.frames)
    times = []
    for _ in range(rounds + 3):
        started = now(device)
        loss = objective(model, batch).mean()
        between = now(device)
        loss.backward()
        times.append((between - started, now(device) - between))
    forward, backward = zip(*times[3:], strict=True)
    return median(forward), median(backward)


def _step(world: World, folder: Path, rounds: int) -> float:
    """Median seconds of an optimizer step of one micro-batch, by the engine that training uses."""
    config = _config(FEW, str(folder), world.mesh.dp.size)
    engine = build_engine(config, world, "made-up data")
    replica = world.mesh.dp
    batches = micro_batches(config.model, config.model.frames, 1, replica.rank, replica.size)
    times = []
    for _ in range(rounds + 3):
        started = now(world.device)
        engine.train_batch(batches)
        times.append(now(world.device) - started)
    return median(times[3:])
