"""Initial values: a function of (seed, canonical name), so that every layout starts alike.

A new temporal channel inherits the base's QKV and positions; its output projection is drawn, not
copied and not zero; the mixture starts at one half. (docs/model.md 7.)
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
import xxhash
from torch import Tensor, nn

from megavideo.config.schema import ModelConfig

STD = 0.02


def initialise(parameters: Mapping[str, nn.Parameter], model: ModelConfig, seed: int) -> None:
    """Fill every parameter, then let the temporal channel inherit from the base."""
    for name, parameter in parameters.items():
        _fill(parameter, name, model, seed)
    inherit(parameters, model)


def inherit(parameters: Mapping[str, nn.Parameter], model: ModelConfig) -> None:
    """Copy what a fresh temporal channel takes over from the base; call it after loading a base."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            source = inherited_from(name)
            if source is not None:
                parameter.copy_(_inherited(parameters[source], name, parameter, model))


def inherited_from(name: str) -> str | None:
    """The base parameter whose values the temporal parameter `name` starts with, if any."""
    if name == "embedding.frame_position":
        return "embedding.position"
    if fnmatchcase(name, "*.attention.temporal.qkv.*"):
        return name.replace(".temporal.", ".spatial.")
    return None


def _inherited(source: Tensor, name: str, target: Tensor, model: ModelConfig) -> Tensor:
    if name != "embedding.frame_position":
        return source
    start, size = model.image_position, model.grid.tokens_per_frame
    times = -(-len(target) // size)
    return source[start : start + size].repeat(times, 1)[: len(target)]


def _fill(parameter: nn.Parameter, name: str, model: ModelConfig, seed: int) -> None:
    with torch.no_grad():
        if fnmatchcase(name, "*norm.weight"):
            parameter.fill_(1)
        elif name.endswith((".bias", ".mixture")):
            parameter.zero_()
        else:
            generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode(), seed))
            drawn = torch.empty(parameter.shape).normal_(0, _std(name, model), generator=generator)
            parameter.copy_(drawn)


def _std(name: str, model: ModelConfig) -> float:
    """Base projections back into the residual stream are scaled down by depth."""
    if name.endswith((".attention.spatial.dense.weight", ".mlp.down.weight")):
        return STD / (2 * model.layers) ** 0.5
    return STD
