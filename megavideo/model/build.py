"""The model as one list of layers, which every container holds (one process, pipeline, tests)."""

from torch import nn

from megavideo.config.schema import ModelConfig, RecipeConfig, Recompute
from megavideo.layout.grid import Grid
from megavideo.layout.rules import loss_frames, spatial_rule, temporal_rule
from megavideo.model.block import Block
from megavideo.model.embed import Embedding
from megavideo.model.head import CopiedRows, Head, TiedRows
from megavideo.model.trainable import is_trainable
from megavideo.parallel.mesh import SINGLE, Mesh
from megavideo.parallel.region import Region, region_of


def stage_grid(model: ModelConfig, stage: str) -> Grid:
    """The grid of one sample: the base model of stage `image` sees a single frame."""
    return Grid(model.text_slots, 1 if stage == "image" else model.frames, model.side)


def layer_list(
    model: ModelConfig,
    recipe: RecipeConfig,
    recompute: Recompute = "none",
    mesh: Mesh = SINGLE,
    sequence_parallel: bool = False,
) -> list[nn.Module]:
    """Embedding, blocks, head: the only description of what follows what.

    Each layer maps one tuple to one tuple and has a `name`, the prefix of its parameters' canonical
    names. Parameters are allocated, this rank's part of each, not initialised (see init.py).

    Args:
        mesh: whose tensor-parallel ranks share each layer; on several pipeline stages the head does
            not rely on the embedding being near.

    Raises:
        ValueError: if the model cannot be cut over the mesh.
    """
    grid = stage_grid(model, recipe.stage)
    region = region_of(mesh.tp, sequence_parallel)
    embedding = Embedding(model, grid.frames, recipe.hidden_dropout, region)
    blocks = [
        _block(index, grid, model, recipe, recompute, region) for index in range(model.layers)
    ]
    rows = _image_rows(embedding, model, recipe, mesh)
    head = Head(rows, model, loss_frames(recipe.stage, grid.frames), region)
    return [embedding, *blocks, head]


def _image_rows(
    embedding: Embedding, model: ModelConfig, recipe: RecipeConfig, mesh: Mesh
) -> TiedRows | CopiedRows:
    """A trained table stays tied. A frozen one is, too, where no rank lacks a row it needs."""
    alone = mesh.tp.size == 1 and mesh.pp.size == 1
    if alone or is_trainable("embedding.word", recipe.stage):
        return TiedRows(embedding.word, model.image_codes, mesh.tp)
    return CopiedRows(model, mesh.tp)


def _block(
    index: int,
    grid: Grid,
    model: ModelConfig,
    recipe: RecipeConfig,
    recompute: Recompute,
    region: Region,
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
        recompute,
        region,
    )


def build_model(
    model: ModelConfig,
    recipe: RecipeConfig,
    recompute: Recompute = "none",
    mesh: Mesh = SINGLE,
    sequence_parallel: bool = False,
) -> nn.Sequential:
    """`layer_list` in one container: `model((text, text_length, image))` gives logits (head.py)."""
    return nn.Sequential(*layer_list(model, recipe, recompute, mesh, sequence_parallel))


def canonical_parameters(container: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter once, by the name that does not depend on the container.

    For example `layers.0.attention.temporal.qkv.weight`; the tied word table is `embedding.word`.
    """
    parameters: dict[str, nn.Parameter] = {}
    seen: set[nn.Parameter] = set()
    for layer in container.children():
        for local, parameter in layer.named_parameters():
            if parameter not in seen:
                seen.add(parameter)
                parameters[f"{layer.name}.{local}"] = parameter
    return parameters
