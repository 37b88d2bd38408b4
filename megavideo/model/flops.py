"""FLOPs of one sample, part by part, knowing what is frozen: the useful work that MFU counts.

A multiply-add is 2 FLOPs. Attention counts visible pairs only, with all text slots real; the head
counts image columns at loss-carrying slots. Frozen weights cost no weight gradient, and the text
stream, which meets only frozen weights, costs no backward at all. Recomputation is not useful work.
"""

from dataclasses import dataclass

from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.layout.render import visible_pairs
from megavideo.layout.rules import Rule, loss_frames, spatial_rule, temporal_rule
from megavideo.model.build import stage_grid


@dataclass(frozen=True)
class Work:
    """FLOPs of one part of the model for one sample."""

    part: str
    forward: int
    input_gradient: int
    weight_gradient: int

    @property
    def total(self) -> int:
        """Forward and backward."""
        return self.forward + self.input_gradient + self.weight_gradient

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.part,
            self.forward + other.forward,
            self.input_gradient + other.input_gradient,
            self.weight_gradient + other.weight_gradient,
        )


def training_flops(model: ModelConfig, recipe: RecipeConfig) -> int:
    """Useful FLOPs of forward and backward of one sample."""
    return sum(work.total for work in sample_work(model, recipe))


def sample_work(model: ModelConfig, recipe: RecipeConfig) -> list[Work]:
    """The table behind `training_flops`: each part of the model, summed over layers."""
    total: dict[str, Work] = {}
    for layer in layer_work(model, recipe):
        for work in layer:
            total[work.part] = total[work.part] + work if work.part in total else work
    return list(total.values())


def layer_work(model: ModelConfig, recipe: RecipeConfig) -> list[list[Work]]:
    """The parts of each layer of model/build.py's list; an embedding looks up, which is no work."""
    blocks = [_block_work(model, recipe, index) for index in range(model.layers)]
    grid = stage_grid(model, recipe.stage)
    slots = len(loss_frames(recipe.stage, grid.frames)) * grid.tokens_per_frame
    head = _linear("head", slots, model.hidden * model.image_codes, True, recipe.stage == "image")
    return [[], *blocks, [head]]


def _block_work(model: ModelConfig, recipe: RecipeConfig, layer: int) -> list[Work]:
    grid, h = stage_grid(model, recipe.stage), model.hidden
    base_trains = recipe.stage == "image"
    spatial = spatial_rule(grid, recipe.stage)
    work = [
        _linear("text stream", grid.text, 12 * h * h, base_trains, base_trains),
        _attention("text attention", grid.text**2, h, base_trains),
        _linear("image stream", grid.image_tokens, 12 * h * h, True, base_trains),
        _image_attention("spatial attention", spatial, grid.text, h, base_trains),
    ]
    if not base_trains:
        rule = temporal_rule(grid, recipe.stage, recipe.window, layer)
        work += [
            _linear("temporal on images", grid.image_tokens, 4 * h * h, True, True),
            _linear("temporal on text", grid.text, 2 * h * h, False, True),
            _image_attention("temporal attention", rule, grid.text, h, True),
        ]
    return work


def _linear(part: str, rows: int, weights: int, input_gradient: bool, trains: bool) -> Work:
    flops = 2 * rows * weights
    return Work(part, flops, flops * input_gradient, flops * trains)


def _attention(part: str, pairs: int, hidden: int, backward: bool) -> Work:
    """Two matrix products forward; four backward (dV, dP, dQ, dK)."""
    flops = 4 * pairs * hidden
    return Work(part, flops, 2 * flops * backward, 0)


def _image_attention(part: str, rule: Rule, text: int, hidden: int, text_gradient: bool) -> Work:
    """Image queries over image and text keys; frozen text keys and values need no gradient."""
    image = _attention(part, visible_pairs(rule), hidden, True)
    flops = 4 * rule.frames * rule.side**2 * text * hidden
    return Work(
        part,
        image.forward + flops,
        image.input_gradient + flops * (2 if text_gradient else 1),
        0,
    )
