"""The mesh as DeepSpeed asks for it: its "model parallel unit"."""

from collections.abc import Mapping
from functools import lru_cache

import torch.distributed as dist
from torch import nn

from megavideo.parallel.mesh import Axis, Mesh
from megavideo.parallel.part import part_of


class ModelParallelUnit:
    """Answers DeepSpeed 0.19.8's questions about a mesh without pipeline stages.

    It reduces gradients and cuts optimizer state over the data-parallel group only, and takes the
    gradient norm over the model-parallel group, counting parameters that are not marked
    `tensor_model_parallel` on its first rank only. It wants a group also for an axis of one.
    """

    def __init__(self, mesh: Mesh):
        self._data, self._model = mesh.dp, mesh.tp
        self._data_group, self._model_group = _group(mesh.dp), _group(mesh.tp)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._data.ranks)

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model_group

    def get_model_parallel_rank(self) -> int:
        return self._model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._model.size

    # The loader of universal checkpoints asks by this name.
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def mark_cut(parameters: Mapping[str, nn.Parameter]) -> None:
    """Mark what is cut over tensor-parallel ranks, so that every rank's part counts in the norm."""
    for parameter in parameters.values():
        if part_of(parameter).shard.dim is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def _group(axis: Axis) -> dist.ProcessGroup:
    if axis.group is not None:
        return axis.group
    return _alone(dist.group.WORLD)


@lru_cache(maxsize=1)
def _alone(world: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of this process in `world`. One serves all: each would hold sockets of its own."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)
