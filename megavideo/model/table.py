"""Every parameter of a model in one table, from the meta device: nothing is allocated."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.trainable import is_trainable
from megavideo.parallel.part import part_of
from megavideo.parallel.shard import Shape, Shard


@dataclass(frozen=True)
class ParameterRow:
    """A parameter: canonical name, whole shape, cut, whether it is trained, and its layer's name.

    `layer` is `embedding`, `layers.0`, ..., `head`: what stays together in a pipeline and in files.
    """

    name: str
    shape: Shape
    shard: Shard
    trainable: bool
    layer: str


def parameter_table(model: ModelConfig, recipe: RecipeConfig) -> list[ParameterRow]:
    """Rows in the order of the layers."""
    with torch.device("meta"):
        parameters = canonical_parameters(build_model(model, recipe))
    return [
        ParameterRow(
            name,
            tuple(parameter.shape),
            part_of(parameter).shard,
            is_trainable(name, recipe.stage),
            layer_of(name),
        )
        for name, parameter in parameters.items()
    ]


def layer_of(name: str) -> str:
    """The layer that a canonical parameter name belongs to, as `layers.12`."""
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if first == "layers" else first


def shard_named(name: str) -> Shard:
    """How the parameter with this canonical name is cut; no cut depends on a model's sizes.

    Raises: ValueError if no model has such a parameter.
    """
    try:
        return _shards()[re.sub(r"^layers\.\d+\.", "layers.0.", name)]
    except KeyError:
        raise ValueError(f"{name} is no parameter of a MegaVideo model") from None


def expected_shapes(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Names and shapes of the whole model of which `shapes` shows the sizes.

    The width is read from `head.norm.weight`, the depth from the highest layer number, rows from
    the three tables; with anything of a temporal channel it is a text-to-video model.

    Raises: ValueError if one of these is missing.
    """
    numbers = [int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name))]
    video = [name for name in shapes if is_trainable(name, "keyframes")]
    needed = ["head.norm.weight", "embedding.word", "embedding.position"]
    needed += ["embedding.frame_position"] if video else []
    missing = [name for name in needed if name not in shapes]
    if missing or not numbers:
        raise ValueError(f"missing {', '.join(missing or ['layers.0'])}")
    sizes = _sizes(*(shapes[name][0] for name in needed), layers=max(numbers) + 1)
    recipe = RecipeConfig(stage="keyframes" if video else "image", steps=1)
    return {row.name: row.shape for row in parameter_table(sizes, recipe)}


def _sizes(
    hidden: int, words: int, positions: int, frame_rows: int = 1, *, layers: int = 1
) -> ModelConfig:
    """A model of these sizes; what no shape depends on (heads, token ids, grid) is made up."""
    return ModelConfig(
        hidden=hidden,
        heads=1,
        layers=layers,
        text_slots=1,
        frames=2,
        side=1,
        vocab_size=words,
        image_codes=1,
        pad=0,
        newline=0,
        begin_of_image=0,
        position_rows=positions,
        image_position=1,
        frame_position_rows=frame_rows,
    )


@cache
def _shards() -> dict[str, Shard]:
    table = parameter_table(_sizes(1, 2, 2), RecipeConfig(stage="keyframes", steps=1))
    return {row.name: row.shard for row in table}
