"""A model with its weights: drawn, inherited, or read back, by one strict rule for names."""

from collections.abc import Mapping, Sequence
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
from megavideo.model.table import parameter_table
from megavideo.model.trainable import is_trainable, mark_trainable
from megavideo.parallel.shard import Shape


def new_model(config: Config, device: torch.device) -> nn.Sequential:
    """The model on `device`, trainable parameters marked, values not set yet."""
    model = _meta_model(config)
    _materialise(model, device)
    return model


def new_layers(config: Config, device: torch.device, held: Sequence[int]) -> list[nn.Module]:
    """All layers, but only those numbered in `held` with memory; the head has its own word rows."""
    layers = list(_meta_model(config))
    layers[-1].untie()  # type: ignore[operator]
    _materialise(nn.ModuleList(layers[number] for number in held), device)
    return layers


def _meta_model(config: Config) -> nn.Sequential:
    with torch.device("meta"):
        model = build_model(config.model, config.recipe, config.parallel.recompute)
    mark_trainable(canonical_parameters(model), config.recipe.stage)
    return model


def start_weights(parameters: Mapping[str, nn.Parameter], config: Config) -> None:
    """Set all weights for a fresh run: drawn from the seed, then recipe.base, then start_from."""
    recipe = config.recipe
    initialise(parameters, config.model, recipe.seed)
    if recipe.base is not None:
        base = _subset(parameters, recipe.stage, trainable=False)
        shapes = _shapes(config, trainable=False)
        source = open_base_weights(Path(recipe.base))
        load_tensors(base, source, shapes, f"recipe.base={recipe.base}")
        inherit(parameters, config.model)
    if recipe.start_from is not None:
        channel = _subset(parameters, recipe.stage, trainable=True)
        shapes = _shapes(config, trainable=True)
        source = open_start_weights(Path(recipe.start_from))
        load_tensors(channel, source, shapes, f"recipe.start_from={recipe.start_from}")


def checkpoint_weights(
    parameters: Mapping[str, nn.Parameter], config: Config, checkpoint: Path
) -> None:
    """Set all weights to a checkpoint's: what it trained, and the frozen base that it refers to."""
    reader = RunReader(checkpoint)
    weights = Selection(reader, (name for name in reader.tensors if not is_moment(name)))
    shapes = _shapes(config, trainable=False) | _shapes(config, trainable=True)
    load_tensors(parameters, weights, shapes, str(checkpoint))


def load_model(config: Config, checkpoint: Path, device: torch.device) -> nn.Sequential:
    """A checkpoint's model for evaluation and generation: in recipe.precision, without dropout."""
    model = new_model(config, device)
    checkpoint_weights(canonical_parameters(model), config, checkpoint)
    return model.to(DTYPES[config.recipe.precision]).eval()


def load_tensors(
    parameters: Mapping[str, nn.Parameter], source: Source, want: Mapping[str, Shape], what: str
) -> None:
    """Read this rank's parameters from `source`, one at a time.

    Args:
        want: shapes of all parameters, other ranks' too: `source` must have these and no others.
        what: the source's name for people.

    Raises:
        ValueError: listing everything that is missing, unexpected or of another shape; if the
            source is damaged.
    """
    have = source.tensors
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


def _shapes(config: Config, trainable: bool) -> dict[str, Shape]:
    """Whole shapes of all parameters that are trained, or of all that are frozen."""
    rows = parameter_table(config.model, config.recipe)
    return {row.name: row.shape for row in rows if row.trainable == trainable}


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
                memory = torch.empty_like(parameter, device=device)
                real[parameter] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                real[parameter].__dict__.update(parameter.__dict__)  # its cut, and what it copies
            setattr(module, name, real[parameter])
