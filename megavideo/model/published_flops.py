"""FLOPs of one sample as the published code executes it: what ours are a saving against.

Text is computed, and differentiated, like images; scores are dense squares (the temporal channel's
of w x w x frames slots where there are windows); logits have all vocabulary rows at all slots.
"""

from megavideo.config.schema import ModelConfig, RecipeConfig, Recompute
from megavideo.model.flops import Work, done_again


def published_work(
    model: ModelConfig, recipe: RecipeConfig, recompute: Recompute = "none"
) -> list[Work]:
    """Parts summed over layers, for the video stages."""
    grid, h = model.grid, model.hidden
    slots, images, text = grid.sequence, grid.image_tokens, grid.text
    seen = recipe.window**2 * grid.frames if recipe.window else images
    spatial = slots * text + images * grid.tokens_per_frame
    temporal = images * (seen + text)
    layers = model.layers
    attention = [
        _linear("frozen projections", layers * slots * 4 * h * h, trains=False),
        _linear("temporal projections", layers * (3 * slots + images) * h * h, trains=True),
        _attention("spatial attention", layers * spatial * h),
        _attention("temporal attention", layers * temporal * h),
    ]
    mlp = _linear("mlp", layers * slots * 8 * h * h, trains=False)
    return [
        *done_again(attention, "attention", recompute),
        *done_again([mlp], "mlp", recompute),
        _linear("head", slots * h * model.vocab_size, trains=False),
    ]


def _linear(part: str, multiplications: int, trains: bool) -> Work:
    flops = 2 * multiplications
    return Work(part, flops, flops, flops * trains)


def _attention(part: str, multiplications: int) -> Work:
    """Two products forward, four backward, of which autograd keeps the scores."""
    flops = 4 * multiplications
    return Work(part, flops, 2 * flops, 0)
