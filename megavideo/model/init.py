"""Initial values: a function of (seed, canonical name), so that every layout starts alike.

A new temporal channel inherits the base's QKV and positions; its output projection is drawn, not
copied and not zero; the mixture starts at one half. (docs/model.md 7.)
"""

from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import xxhash
from torch import Tensor

from megavideo.config.schema import ModelConfig
from megavideo.model.places import Place

STD = 0.02


def initialise(
    places: Sequence[Place], model: ModelConfig, seed: int, loaded: Container[str] = ()
) -> None:
    """Fill every place, then let the temporal channel inherit from the base.

    A parameter is drawn whole and cut afterwards, so that a cut changes no value.

    Args:
        loaded: names of what will be loaded: nothing is drawn for them (two minutes a rank at the
            published size), and `inherit` is to be called afterwards.
    """
    for place in places:
        if place.name not in loaded and inherited_from(place.name) is None:
            place.fill(_drawn(place, model, seed))
    inherit({place.name: place.memory for place in places}, model)


def inherit(parameters: Mapping[str, Tensor], model: ModelConfig) -> None:
    """Copy what a fresh temporal channel takes over from the base; call it after loading a base.

    A parameter is cut as the one that it inherits from, so parts inherit from parts.
    """
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


def _drawn(place: Place, model: ModelConfig, seed: int) -> Tensor:
    """The initial value of a whole parameter."""
    name, whole = place.name, torch.empty(place.shape)
    if fnmatchcase(name, "*norm.weight"):
        return whole.fill_(1)
    if name.endswith((".bias", ".mixture")):
        return whole.zero_()
    generator = torch.Generator().manual_seed(xxhash.xxh3_64_intdigest(name.encode(), seed))
    return whole.normal_(0, _std(name, model), generator=generator)


def _std(name: str, model: ModelConfig) -> float:
    """Base projections back into the residual stream are scaled down by depth."""
    if name.endswith((".attention.spatial.dense.weight", ".mlp.down.weight")):
        return STD / (2 * model.layers) ** 0.5
    return STD
