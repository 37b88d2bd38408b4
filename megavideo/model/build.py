"""The model as one list of layers, which every container holds (one process, pipeline, tests)."""

from torch import nn

from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.layout.grid import Grid
from megavideo.layout.rules import loss_frames, spatial_rule, temporal_rule
from megavideo.model.block import Block
from megavideo.model.embed import Embedding
from megavideo.model.head import Head
from megavideo.model.layers import is_copy


def stage_grid(model: ModelConfig, stage: str) -> Grid:
    """The grid of one sample: the base model of stage `image` sees a single frame."""
    return Grid(model.text_slots, 1 if stage == "image" else model.frames, model.side)


def layer_list(
    model: ModelConfig, recipe: RecipeConfig, recompute: str = "none"
) -> list[nn.Module]:
    """Embedding, blocks, head: the only description of what follows what.

    Each layer maps one tuple to one tuple and has a `name`, the prefix of its parameters' canonical
    names. Parameters are allocated, not initialised (see init.py).
    """
    grid = stage_grid(model, recipe.stage)
    embedding = Embedding(model, grid.frames, recipe.hidden_dropout)
    blocks = [_block(index, grid, model, recipe, recompute) for index in range(model.layers)]
    head = Head(
        embedding.word,
        model.image_codes,
        grid.tokens_per_frame,
        loss_frames(recipe.stage, grid.frames),
        model.norm_eps,
    )
    return [embedding, *blocks, head]


def _block(
    index: int, grid: Grid, model: ModelConfig, recipe: RecipeConfig, recompute: str
) -> Block:
    video = recipe.stage != "image"
    return Block(
        index,
        model.hidden,
        model.heads,
        spatial_rule(grid, recipe.stage),
        temporal_rule(grid, recipe.stage, recipe.window, index) if video else None,
        recipe.hidden_dropout,
        recipe.attention_dropout,
        model.norm_eps,
        recompute == "layer",
    )


def build_model(model: ModelConfig, recipe: RecipeConfig, recompute: str = "none") -> nn.Sequential:
    """The list in one process: `model((text, text_length, image))` gives logits (see head.py)."""
    return nn.Sequential(*layer_list(model, recipe, recompute))


def canonical_parameters(container: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by the name that does not depend on the container.

    For example `layers.0.attention.temporal.qkv.weight`; the tied word table is `embedding.word`,
    and a head that holds a copy of its rows has no name for it.
    """
    parameters: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for layer in container.children():
        for local, parameter in layer.named_parameters():
            if parameter not in seen and not is_copy(parameter):
                seen.add(parameter)
                parameters[f"{layer.name}.{local}"] = parameter
    return parameters
