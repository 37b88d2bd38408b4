"""The tripwire: frozen weights must be, bit for bit, what they were when the run started."""

from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor, nn

from megavideo.checkpoint.files import combined_digest, tensor_entry
from megavideo.engine.errors import RunFailed
from megavideo.engine.quiet import deepspeed
from megavideo.engine.world import World


class FrozenWeights:
    """The frozen parameters of every rank, and the digest that they had at the start."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World):
        self._parameters = {n: p for n, p in parameters.items() if not p.requires_grad}
        self._world = world
        self._entries = {name: tensor_entry(tensor) for name, tensor in self._whole()}
        self.digest = combined_digest(self._entries) if self._entries else None

    def check(self) -> None:
        """Hash them again, on each rank.

        Raises:
            RunFailed: on all ranks, if a tensor changed on any; it names the tensors.
        """
        changed = [n for n, tensor in self._whole() if tensor_entry(tensor) != self._entries[n]]
        everywhere: list[list[str]] = [[] for _ in range(self._world.size)]
        dist.all_gather_object(everywhere, changed)
        names = sorted({name for names in everywhere for name in names})
        if names:
            raise RunFailed(
                f"frozen weights changed during training: {', '.join(names)}. Nothing was saved; "
                "the last checkpoint is intact. Look for code that writes to them, or for failing "
                "memory"
            )

    def gather(self) -> dict[str, Tensor]:
        """All of them on rank 0's CPU; empty elsewhere. All ranks call it."""
        first = self._world.rank == 0
        return {name: tensor.cpu() for name, tensor in self._whole() if first}

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter whole; ZeRO 3 gathers one at a time."""
        for name, parameter in self._parameters.items():
            if hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    yield name, parameter.detach()
            else:
                yield name, parameter.detach()
