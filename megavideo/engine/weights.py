"""A model with its weights: drawn, inherited, or read back, by one strict rule for names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.interface import Selection, Source, is_moment
from megavideo.checkpoint.formats.run import RunReader
from megavideo.checkpoint.manifest import MANIFEST
from megavideo.checkpoint.sources import Start, base_weights, channel_weights, find_start
from megavideo.config.schema import Config
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.execution import DTYPES
from megavideo.model.init import inherit, initialise
from megavideo.model.places import Place, places
from megavideo.model.table import parameter_table
from megavideo.model.trainable import mark_trainable
from megavideo.parallel.mesh import SINGLE, Mesh
from megavideo.parallel.part import part_of, with_part
from megavideo.parallel.shard import Shape


def new_model(config: Config, device: torch.device, mesh: Mesh = SINGLE) -> nn.Sequential:
    """The model on `device` in recipe.precision, trainable parameters marked, values not set yet.

    Args:
        mesh: of which this rank gets its part of every layer; without it the layers are whole.
    """
    model = _meta_model(config, mesh)
    _materialise(model, device, DTYPES[config.recipe.precision])
    return model


def new_layers(
    config: Config, device: torch.device, held: Sequence[int], mesh: Mesh
) -> list[nn.Module]:
    """All layers in recipe.precision, but only those numbered in `held` with memory."""
    layers = list(_meta_model(config, mesh))
    here = nn.ModuleList(layers[number] for number in held)
    _materialise(here, device, DTYPES[config.recipe.precision])
    return layers


def _meta_model(config: Config, mesh: Mesh) -> nn.Sequential:
    parallel = config.parallel
    slots_are_cut = parallel.sequence_parallel and mesh.tp.size > 1
    with torch.device("meta"):
        model = build_model(config.model, config.recipe, parallel.recompute, mesh, slots_are_cut)
    mark_trainable(canonical_parameters(model), config.recipe.stage)
    return model


def start_weights(model: nn.Module, config: Config, start: Start | None = None) -> None:
    """Set all weights for a fresh run: drawn from the seed, then recipe.base, then start_from.

    Args:
        start: what `find_start` found for all ranks; one process alone may leave it out.
    """
    recipe, here = config.recipe, places(model)
    start = start or find_start(recipe)
    frozen = _shapes(config, trained=False)
    initialise(here, config.model, recipe.seed, loaded=() if recipe.base is None else frozen)
    if recipe.base is not None:
        base = base_weights(Path(recipe.base), start.base)
        load_tensors(here, base, frozen, f"recipe.base={recipe.base}")
        inherit(canonical_parameters(model), config.model)
    if start.channel is not None:
        channel = channel_weights(start.channel)
        what = f"recipe.start_from={recipe.start_from}"
        load_tensors(here, channel, _shapes(config, trained=True), what)


def checkpoint_weights(model: nn.Module, config: Config, checkpoint: Path) -> None:
    """Set all weights to a checkpoint's: what it trained, and the frozen base that it refers to.

    Args:
        checkpoint: of a run, or a folder of bare weights in any format that can be converted.
    """
    of_run = (checkpoint / MANIFEST).is_file()
    reader = RunReader(checkpoint) if of_run else open_checkpoint(checkpoint)
    weights = Selection(reader, (name for name in reader.tensors if not is_moment(name)))
    load_tensors(places(model), weights, _shapes(config), str(checkpoint))


def load_model(
    config: Config, checkpoint: Path, device: torch.device, mesh: Mesh = SINGLE
) -> nn.Sequential:
    """A checkpoint's model for evaluation and generation: in recipe.precision, without dropout.

    Args:
        mesh: of which this rank gets its part of every layer; without it the layers are whole.
    """
    model = new_model(config, device, mesh)
    checkpoint_weights(model, config, checkpoint)
    return model.eval()


def load_tensors(
    here: Sequence[Place], source: Source, shapes: Mapping[str, Shape], what: str
) -> None:
    """Read each place's part from `source`, one at a time; names and shapes must match.

    Args:
        here: this rank's places; those that `shapes` does not name stay as they are.
        shapes: of all whole tensors that the source must have, and it must have no others.
        what: the source's name for people.

    Raises:
        ValueError: listing everything that is missing, unexpected or of another shape; if the
            source is damaged.
    """
    have = source.tensors
    problems = [f"missing {name}" for name in sorted(shapes.keys() - have.keys())]
    problems += [f"unexpected {name}" for name in sorted(have.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & have.keys()):
        if have[name].shape != shapes[name]:
            found = f"{list(have[name].shape)}, this model needs {list(shapes[name])}"
            problems.append(f"{name} has shape {found}")
    if problems:
        raise ValueError(f"{what} does not fit this model: {'; '.join(problems)}")
    for place in here:
        if place.name in shapes:
            rank, size, start, stop = place.slice
            place.put(source.read_part(place.name, rank, size, start, stop))


def _shapes(config: Config, trained: bool | None = None) -> dict[str, Shape]:
    """Whole shapes by name: of all parameters, or of those that are trained, or of the others."""
    rows = parameter_table(config.model, config.recipe)
    return {row.name: row.shape for row in rows if trained in (None, row.trainable)}


def _materialise(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Give meta tensors memory. `to_empty` would do, but it separates tied parameters.

    All is in `precision` at once: float32 first, which DeepSpeed would cast, needs twice the memory
    (31 GB a GPU of the published model), and it casts no buffers (copies of frozen rows).
    """
    real: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in real:
                memory = torch.empty_like(parameter, device=device, dtype=precision)
                real[parameter] = nn.Parameter(memory, requires_grad=parameter.requires_grad)
                with_part(real[parameter], part_of(parameter))
            setattr(module, name, real[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device, dtype=precision))
