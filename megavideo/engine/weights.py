"""A model with its weights: drawn, inherited, or read back, by one strict rule for names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from megavideo.checkpoint.formats.interface import Selection, Source, is_moment
from megavideo.checkpoint.formats.run import RunReader
from megavideo.checkpoint.sources import open_base_weights, open_start_weights
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
        load_tensors(base, open_base_weights(Path(recipe.base)), f"recipe.base={recipe.base}")
        inherit(parameters, config.model)
    if recipe.start_from is not None:
        channel = _subset(parameters, recipe.stage, trainable=True)
        source = f"recipe.start_from={recipe.start_from}"
        load_tensors(channel, open_start_weights(Path(recipe.start_from)), source)


def checkpoint_weights(parameters: Mapping[str, nn.Parameter], checkpoint: Path) -> None:
    """Set all weights to a checkpoint's: what it trained, and the frozen base that it refers to."""
    reader = RunReader(checkpoint)
    weights = Selection(reader, (name for name in reader.tensors if not is_moment(name)))
    load_tensors(parameters, weights, str(checkpoint))


def load_model(config: Config, checkpoint: Path, device: torch.device) -> nn.Sequential:
    """A checkpoint's model for evaluation and generation: in recipe.precision, without dropout."""
    model = new_model(config, device)
    checkpoint_weights(canonical_parameters(model), checkpoint)
    return model.to(DTYPES[config.recipe.precision]).eval()


def load_tensors(parameters: Mapping[str, nn.Parameter], source: Source, what: str) -> None:
    """Read every parameter from `source`, one at a time; names and shapes must match.

    Args:
        what: the source's name for people.

    Raises:
        ValueError: listing everything that is missing, unexpected or of another shape; if the
            source is damaged.
    """
    have, want = source.tensors, {name: tuple(p.shape) for name, p in parameters.items()}
    problems = [f"missing {name}" for name in sorted(want.keys() - have.keys())]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - want.keys())]
    for name in sorted(want.keys() & have.keys()):
        if have[name].shape != want[name]:
            shapes = f"{list(have[name].shape)}, this model needs {list(want[name])}"
            problems.append(f"{name} has shape {shapes}")
    if problems:
        raise ValueError(f"{what} does not fit this model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(source.read(name))


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
