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


def training_flops(model: ModelConfig, recipe: RecipeConfig) -> int:
    """Useful FLOPs of forward and backward of one sample."""
    return sum(work.total for work in sample_work(model, recipe))


def sample_work(model: ModelConfig, recipe: RecipeConfig) -> list[Work]:
    """The table behind `training_flops`, summed over layers."""
    grid, h = stage_grid(model, recipe.stage), model.hidden
    base_trains = recipe.stage == "image"
    layers = range(model.layers)
    spatial = [spatial_rule(grid, recipe.stage)] * model.layers
    slots = len(loss_frames(recipe.stage, grid.frames)) * grid.tokens_per_frame
    work = [
        _linear("text stream", model.layers * grid.text, 12 * h * h, base_trains, base_trains),
        _attention("text attention", model.layers * grid.text**2, h, base_trains),
        _linear("image stream", model.layers * grid.image_tokens, 12 * h * h, True, base_trains),
        _image_attention("spatial attention", spatial, grid.text, h, base_trains),
        _linear("head", slots, h * model.image_codes, True, base_trains),
    ]
    if not base_trains:
        rules = [temporal_rule(grid, recipe.stage, recipe.window, layer) for layer in layers]
        work += [
            _linear("temporal on images", model.layers * grid.image_tokens, 4 * h * h, True, True),
            _linear("temporal on text", model.layers * grid.text, 2 * h * h, False, True),
            _image_attention("temporal attention", rules, grid.text, h, True),
        ]
    return work


def _linear(part: str, rows: int, weights: int, input_gradient: bool, trains: bool) -> Work:
    flops = 2 * rows * weights
    return Work(part, flops, flops * input_gradient, flops * trains)


def _attention(part: str, pairs: int, hidden: int, backward: bool) -> Work:
    """Two matrix products forward; four backward (dV, dP, dQ, dK)."""
    flops = 4 * pairs * hidden
    return Work(part, flops, 2 * flops * backward, 0)


def _image_attention(
    part: str, rules: list[Rule], text: int, hidden: int, text_gradient: bool
) -> Work:
    """Image queries over image and text keys; frozen text keys and values need no gradient."""
    image = _attention(part, sum(visible_pairs(rule) for rule in rules), hidden, True)
    queries = sum(rule.frames * rule.side**2 for rule in rules)
    flops = 4 * queries * text * hidden
    return Work(
        part,
        image.forward + flops,
        image.input_gradient + flops * (2 if text_gradient else 1),
        0,
    )
