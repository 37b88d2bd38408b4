"""A model with its weights: drawn, inherited, or read back, by one strict rule for names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from megavideo.checkpoint.sources import read_base, read_frozen, read_start, read_weights
from megavideo.config.schema import Config
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.execution import DTYPES
from megavideo.model.init import inherit, initialise
from megavideo.model.trainable import is_trainable, mark_trainable
from megavideo.parallel.shard import set_shard, shard_of


def new_model(config: Config, device: torch.device) -> nn.Sequential:
    """The model on `device`, trainable parameters marked, values not set yet."""
    with torch.device("meta"):
        model = build_model(config.model, config.recipe, config.parallel.recompute)
    _materialise(model, device)
    mark_trainable(canonical_parameters(model), config.recipe.stage)
    return model


def start_weights(parameters: Mapping[str, nn.Parameter], config: Config) -> None:
    """Set all weights for a fresh run: drawn from the seed, then recipe.base, then start_from."""
    recipe = config.recipe
    initialise(parameters, config.model, recipe.seed)
    if recipe.base is not None:
        base = _subset(parameters, recipe.stage, trainable=False)
        load_tensors(base, read_base(Path(recipe.base)), f"recipe.base={recipe.base}")
        inherit(parameters, config.model)
    if recipe.start_from is not None:
        channel = _subset(parameters, recipe.stage, trainable=True)
        source = f"recipe.start_from={recipe.start_from}"
        load_tensors(channel, read_start(Path(recipe.start_from)), source)


def checkpoint_weights(parameters: Mapping[str, nn.Parameter], checkpoint: Path) -> None:
    """Set all weights to a checkpoint's: what it trained, and the frozen base that it refers to."""
    tensors = {**read_frozen(checkpoint), **read_weights(checkpoint)}
    load_tensors(parameters, tensors, str(checkpoint))


def load_model(config: Config, checkpoint: Path, device: torch.device) -> nn.Sequential:
    """A checkpoint's model for evaluation and generation: in recipe.precision, without dropout."""
    model = new_model(config, device)
    checkpoint_weights(canonical_parameters(model), checkpoint)
    return model.to(DTYPES[config.recipe.precision]).eval()


def load_tensors(
    parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Copy `tensors` into `parameters`, which must match in names and shapes.

    Raises:
        ValueError: listing everything that is missing, unexpected or of another shape.
    """
    problems = [f"missing {name}" for name in sorted(parameters.keys() - tensors.keys())]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - parameters.keys())]
    for name in sorted(parameters.keys() & tensors.keys()):
        have, want = tuple(tensors[name].shape), tuple(parameters[name].shape)
        if have != want:
            problems.append(f"{name} has shape {list(have)}, this model needs {list(want)}")
    if problems:
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def _subset(
    parameters: Mapping[str, nn.Parameter], stage: str, trainable: bool
) -> dict[str, nn.Parameter]:
    return {n: p for n, p in parameters.items() if is_trainable(n, stage) == trainable}


def _materialise(model: nn.Module, device: torch.device) -> None:
    """Give meta parameters memory. `to_empty` would do, but it separates tied ones."""
    assert not list(model.buffers()), "a buffer would lose its values on the meta device"
    real: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in real:
                real[parameter] = nn.Parameter(torch.empty_like(parameter, device=device))
                set_shard(real[parameter], shard_of(parameter))
            setattr(module, name, real[parameter])
