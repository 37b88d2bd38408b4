"""FLOPs of one sample, layer by layer and part by part, knowing what is frozen.

A multiply-add is 2 FLOPs. Without an `Execution` only useful work counts: attention by visible
pairs with all text slots real, the head's image columns at loss-carrying slots, no weight gradient
where weights are frozen, and no backward at all in the text stream, which meets frozen weights
only. With one, it is what a machine executes: whole tiles of attention, and what is computed twice.

    MFU             useful work / (time x peak)
    MFU, naive 6N   6 x all parameters x slots, as papers count: charges frozen weights as trained
    HFU             executed work, recomputation included
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import prod

from megavideo.config.schema import ModelConfig, RecipeConfig, Recompute, Stage
from megavideo.layout.rules import Rule, loss_frames, spatial_rule, temporal_rule
from megavideo.layout.tiles import Attention, attention_products
from megavideo.model.build import stage_grid
from megavideo.model.recompute import Sublayer, computed_again
from megavideo.model.table import ParameterRow, parameter_table


@dataclass(frozen=True)
class Work:
    """FLOPs of one part of the model for one sample.

    Attributes:
        again: forward work that is done once more during the backward pass.
    """

    part: str
    forward: int
    input_gradient: int
    weight_gradient: int
    again: int = 0

    @property
    def total(self) -> int:
        """Forward and backward, each once."""
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.part,
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
            self.again + other.again,
        )


@dataclass(frozen=True)
class Execution:
    """How a machine does the work.

    Attributes:
        attention: the program of image attention (layout/tiles.py).
        recompute: parallel.recompute.
        spatial_attention: that of the spatial channel, if it is another.
    """

    attention: Attention = "visible"
    recompute: Recompute = "none"
    spatial_attention: Attention | None = None

    def program(self, rule: Rule) -> Attention:
        """Of attention by `rule`."""
        spatial = self.spatial_attention or self.attention
        return spatial if rule.own_frame else self.attention


USEFUL = Execution()


def training_flops(model: ModelConfig, recipe: RecipeConfig) -> int:
    """Useful FLOPs of forward and backward of one sample."""
    return sum(work.total for work in sample_work(model, recipe))


def executed_flops(model: ModelConfig, recipe: RecipeConfig, execution: Execution) -> int:
    """FLOPs of one sample that a machine does, recomputation included."""
    return sum(work.total + work.again for work in sample_work(model, recipe, execution))


def naive_flops(model: ModelConfig, recipe: RecipeConfig) -> int:
    """6 FLOPs for each parameter and slot of a sample, as if all were trained, none looked up."""
    return 6 * num_parameters(model, recipe) * stage_grid(model, recipe.stage).sequence


def sample_work(
    model: ModelConfig, recipe: RecipeConfig, execution: Execution = USEFUL
) -> list[Work]:
    """Each part of the model, summed over layers."""
    total: dict[str, Work] = {}
    for layer in layer_work(model, recipe, execution):
        for work in layer:
            total[work.part] = total[work.part] + work if work.part in total else work
    return list(total.values())


def layer_work(
    model: ModelConfig, recipe: RecipeConfig, execution: Execution = USEFUL
) -> list[list[Work]]:
    """The parts of each layer of model/build.py's list; an embedding looks up, which is no work."""
    blocks = [block_work(model, recipe, index, execution) for index in range(model.layers)]
    return [[], *blocks, [head_work(model, recipe)]]


def head_work(model: ModelConfig, recipe: RecipeConfig) -> Work:
    """Logits of image codes at loss-carrying slots."""
    grid = stage_grid(model, recipe.stage)
    slots = len(loss_frames(recipe.stage, grid.frames)) * grid.tokens_per_frame
    return _linear("head", slots, model.hidden * model.image_codes, True, recipe.stage == "image")


def block_work(
    model: ModelConfig, recipe: RecipeConfig, layer: int, execution: Execution = USEFUL
) -> list[Work]:
    """The parts of block `layer`."""
    return list(_block_work(model, recipe.stage, recipe.window, layer, execution))


@lru_cache(maxsize=1024)
def _block_work(
    model: ModelConfig, stage: Stage, window: int, layer: int, execution: Execution
) -> tuple[Work, ...]:
    grid, h = stage_grid(model, stage), model.hidden
    base_trains = stage == "image"
    # Of the last block's text, only keys and values reach the loss.
    text_goes_on = base_trains and layer < model.layers - 1
    spatial = spatial_rule(grid, stage)
    attention = [
        _linear("text stream", grid.text, 3 * h * h, base_trains, base_trains)
        + _linear("text stream", grid.text, h * h, text_goes_on, text_goes_on),
        _text_attention(grid.text, h, text_goes_on),
        _linear("image stream", grid.image_tokens, 4 * h * h, True, base_trains),
        _image_attention("spatial attention", spatial, grid.text, model, execution, base_trains),
    ]
    if not base_trains:
        rule = temporal_rule(grid, stage, window, layer)
        attention += [
            _linear("temporal on images", grid.image_tokens, 4 * h * h, True, True),
            _linear("temporal on text", grid.text, 2 * h * h, False, True),
            _image_attention("temporal attention", rule, grid.text, model, execution, True),
        ]
    mlp = [
        _linear("text stream", grid.text, 8 * h * h, text_goes_on, text_goes_on),
        _linear("image stream", grid.image_tokens, 8 * h * h, True, base_trains),
    ]
    recompute = execution.recompute
    return (*done_again(attention, "attention", recompute), *done_again(mlp, "mlp", recompute))


def done_again(work: Sequence[Work], sublayer: Sublayer, recompute: Recompute) -> list[Work]:
    """Work of a sublayer, with what `recompute` does twice.

    Frozen text too, although it has no backward pass: see block.py.
    """
    if sublayer not in computed_again(recompute):
        return list(work)
    return [replace(part, again=part.forward) for part in work]


def num_parameters(model: ModelConfig, recipe: RecipeConfig) -> int:
    """All parameters, frozen ones included."""
    return sum(prod(row.shape) for row in cached_table(model, recipe.stage == "image"))


@cache
def cached_table(model: ModelConfig, base: bool) -> list[ParameterRow]:
    """The table of a base's or of a video model; nothing else in a recipe matters to it."""
    return parameter_table(model, RecipeConfig(stage="image" if base else "keyframes", steps=1))


def _linear(part: str, rows: int, weights: int, input_gradient: bool, trains: bool) -> Work:
    flops = 2 * rows * weights
    return Work(part, flops, flops * input_gradient, flops * trains)


def _text_attention(text: int, hidden: int, backward: bool) -> Work:
    """Two matrix products forward; four backward (dV, dP, dQ, dK)."""
    flops = 4 * text**2 * hidden
    return Work("text attention", flops, 2 * flops * backward, 0)


def _image_attention(
    part: str, rule: Rule, text: int, model: ModelConfig, execution: Execution, text_gradient: bool
) -> Work:
    """Image queries over image and text keys; frozen text keys and values need no gradient."""
    products = attention_products(
        rule, text, execution.program(rule), model.head_size, text_gradient
    )
    h = model.hidden
    return Work(part, 2 * h * products.forward, 2 * h * products.backward, 0)
