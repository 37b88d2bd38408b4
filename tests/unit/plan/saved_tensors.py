"""Counts what autograd keeps between the passes, by hooks on every saved tensor."""

import gc
import weakref
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from megavideo.config.schema import Config
from megavideo.engine.objective import Objective
from megavideo.model.build import build_model, canonical_parameters, stage_grid
from megavideo.model.execution import DTYPES
from megavideo.model.layers import use_pointwise
from megavideo.model.trainable import mark_trainable
from megavideo.ops.pointwise import compiled
from megavideo.parallel import collectives, loss
from megavideo.parallel.mesh import Axis, Mesh
from megavideo.verify.made_up import batch_at


class _Held:
    """A saved tensor; alive as long as the graph holds it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def saved_bytes(config: Config, attention: str, device: str = "meta") -> int:
    """Bytes of all storages that a micro-batch's forward pass leaves, parameters excluded.

    On the meta device nothing is computed, so collectives need no other rank: they do nothing.

    Args:
        attention: the backend that is to be chosen.
    """
    tp = config.parallel.tp
    mesh = Mesh(tp=Axis(0, tp, tuple(range(tp)), None))
    with torch.device(device):
        model = build_model(
            config.model,
            config.recipe,
            config.parallel.recompute,
            mesh,
            config.parallel.sequence_parallel,
        )
    if config.parallel.compile:
        use_pointwise(model, compiled())
    model = model.to(DTYPES[config.recipe.precision]).train()
    mark_trainable(canonical_parameters(model), config.recipe.stage)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        entry = _Held(tensor.detach())  # a node that holds its own output would live for ever
        held.add(entry)
        return entry

    frames = stage_grid(config.model, config.recipe.stage).frames
    batch = batch_at(config.model, range(config.recipe.micro_batch), frames)
    objective = Objective(config.model, config.recipe, torch.device(device), mesh)
    silent = SimpleNamespace(
        all_reduce=_nothing,
        all_gather_into_tensor=_nothing,
        reduce_scatter_tensor=_nothing,
        ReduceOp=torch.distributed.ReduceOp,
    )
    with (
        mock.patch("megavideo.ops.local_attention.choose", lambda *arguments: attention),
        mock.patch.object(collectives, "dist", silent),
        mock.patch.object(loss, "dist", silent),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda entry: entry.tensor),
    ):
        result = objective(model, batch).mean()
        gc.collect()
        storages = {e.tensor.untyped_storage()._cdata: e.tensor.untyped_storage() for e in held}
    del result
    return sum(storage.nbytes() for key, storage in storages.items() if key not in own)


def _nothing(*arguments: object, **settings: object) -> None:
    pass
