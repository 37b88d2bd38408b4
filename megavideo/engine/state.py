"""Optimizer state in parameter shape, whatever ZeRO stage cuts it into.

torch's optimizer steps flat float32 tensors that DeepSpeed cuts out of the parameters. A `Fragment`
says where a piece of a parameter lies in one of them; everything here is told in fragments:

    ZeRO 0    the flat tensor is the parameter itself
    ZeRO 1-2  one flat tensor per parameter group and rank (`_hp_mapping`, set by DeepSpeed)
    ZeRO 3    one flat tensor per sub-group and rank, every parameter cut evenly over the ranks
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megavideo.checkpoint.formats.interface import MOMENTS, Source, is_moment, parameter_of
from megavideo.parallel.mesh import Mesh
from megavideo.parallel.part import gather_whole, part_of


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + count) of a flattened parameter lie in `flat` from `offset` on.

    Attributes:
        flat: a float32 master copy, the tensor that the optimizer steps and keeps state for.
    """

    flat: Tensor
    offset: int
    start: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The fragment's part of `flat`: the master copy or a state tensor of the same layout."""
        return flat.detach().view(-1).narrow(0, self.offset, self.count)


class OptimizerState:
    """The float32 weights and the optimizer's moments of this rank, by canonical name.

    Args:
        optimizer: the torch optimizer inside DeepSpeed's.
        wrapper: DeepSpeed's optimizer; the same object with ZeRO 0.
        parameters: this rank's trainable parameters by canonical name.
        device: where collectives take their tensors.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        wrapper: Any,
        parameters: Mapping[str, nn.Parameter],
        mesh: Mesh,
        device: torch.device,
    ):
        self._optimizer = optimizer
        self._mesh = mesh
        self._device = device
        self._cut_over_replicas = wrapper is not optimizer
        self._parts = {name: part_of(p) for name, p in parameters.items()}
        self._fragments = {
            name: _fragment(p, optimizer, wrapper, mesh.dp.rank)
            for name, p in sorted(parameters.items())
        }

    @property
    def names(self) -> set[str]:
        """Weights and moments that this rank has a part of, or shares with other replicas."""
        moments = {f"{name}{moment}" for name in self._parts for moment in self.moments}
        return self._parts.keys() | moments

    @property
    def moments(self) -> tuple[str, ...]:
        """Suffixes of the optimizer's moments."""
        return () if isinstance(self._optimizer, torch.optim.SGD) else MOMENTS

    def part(self, name: str, owner: int) -> Tensor | None:
        """This tensor-parallel rank's part of the weight or moment `name`, float32.

        All replicas call it, for the same names in the same order; memory is needed for one part.

        Args:
            owner: the data-parallel rank that gets it; the others get None.
        """
        dp = self._mesh.dp
        if dp.rank != owner and not self._cut_over_replicas:
            return None
        part = self._padded_with_zeros(name)
        if dp.size > 1 and self._cut_over_replicas:
            # As integers, the sum with zeros keeps every bit, the sign of -0.0 too.
            dist.reduce(part.view(torch.int32), dst=dp.ranks[owner], group=dp.group)
        return part if dp.rank == owner else None

    def gather_weights(self) -> dict[str, Tensor]:
        """Whole float32 weights, on rank 0, empty elsewhere. All ranks call it."""
        return self._gather(sorted(self._parts))

    def gather_moments(self) -> dict[str, Tensor]:
        """`NAME.exp_avg` and the like, whole, on rank 0; empty elsewhere."""
        return self._gather(sorted(name for name in self.names if is_moment(name)))

    def restore(self, source: Source, updates: int) -> None:
        """Set master weights and moments to those of a checkpoint after `updates` updates.

        Only what this rank holds is read. The parameters that the forward pass reads must hold the
        checkpoint's weights already.
        """
        for name, fragment in self._present():
            self._read(source, name, fragment, fragment.flat)
        if updates and self.moments:
            self._restore_moments(source)
            self._set_updates(updates)

    def _restore_moments(self, source: Source) -> None:
        for name, fragment in self._present():
            state = self._state(fragment)
            for moment in self.moments:
                key = moment.removeprefix(".")
                if key not in state:  # the first fragment of this flat tensor
                    state[key] = torch.zeros_like(fragment.flat)
                self._read(source, name + moment, fragment, state[key])

    def _set_updates(self, updates: int) -> None:
        """Adam's bias correction counts updates: torch's per flat tensor, apex's per group."""
        if not isinstance(self._optimizer, torch.optim.AdamW):
            for group in self._optimizer.param_groups:
                group["step"] = updates
            return
        for _, fragment in self._present():
            count = torch.tensor(float(updates), device=fragment.flat.device)
            self._state(fragment)["step"] = count

    def _read(self, source: Source, name: str, fragment: Fragment, flat: Tensor) -> None:
        """Fill the fragment's elements of `flat` from the rows of `name` that they lie in.

        Rows that only pad a part are in no file: they are zero.
        """
        part = self._parts[parameter_of(name)]
        width = prod(part.allocated[1:])
        first, last = fragment.start // width, -(-(fragment.start + fragment.count) // width)
        last = min(last, part.held[0])
        values = source.read_part(name, part.rank, part.size, min(first, last), last).reshape(-1)
        values = values[fragment.start - first * width :][: fragment.count]
        fragment.of(flat).zero_()[: len(values)].copy_(values)

    def _gather(self, names: list[str]) -> dict[str, Tensor]:
        mine, tp = {}, self._mesh.tp
        for name in names:
            part = self.part(name, 0)
            if part is not None:
                whole = gather_whole(part, self._parts[parameter_of(name)], tp)
                if tp.is_first:
                    mine[name] = whole.cpu()
        stages = self._mesh.pp
        if stages.size == 1:
            return mine
        everywhere: list[dict[str, Tensor]] | None = [{}] * stages.size if stages.is_first else None
        dist.gather_object(mine, everywhere, dst=stages.ranks[0], group=stages.group)
        return {name: part for some in everywhere or [] for name, part in some.items()}

    def _padded_with_zeros(self, name: str) -> Tensor:
        """The part as it is allocated, zero but for this rank's fragment."""
        parameter = parameter_of(name)
        fragment = self._fragments[parameter]
        part = torch.zeros(self._parts[parameter].allocated, device=self._device)
        if fragment is not None:
            key = name.removeprefix(f"{parameter}.")
            source = fragment.flat if name == parameter else self._state(fragment).get(key)
            if source is not None:
                here = part.view(-1).narrow(0, fragment.start, fragment.count)
                here.copy_(fragment.of(source))
        return part

    def _present(self) -> Iterator[tuple[str, Fragment]]:
        return ((name, f) for name, f in self._fragments.items() if f is not None)

    def _state(self, fragment: Fragment) -> dict[str, Tensor]:
        return self._optimizer.state[fragment.flat]


def _fragment(
    parameter: nn.Parameter, optimizer: torch.optim.Optimizer, wrapper: Any, replica: int
) -> Fragment | None:
    """Where this rank's part of `parameter` lies; None if all of it is on other ranks."""
    if wrapper is optimizer:
        return Fragment(parameter, 0, 0, parameter.numel())
    if hasattr(parameter, "ds_id"):
        return _zero3_fragment(parameter, wrapper, replica)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
    master, param = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(flat, master.start, param.start, param.numel)


def _zero3_fragment(parameter: Any, wrapper: Any, replica: int) -> Fragment | None:
    group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start = replica * length
    count = min(length, parameter.ds_numel - start)  # the last ranks' parts are padded
    if count <= 0:
        return None
    return Fragment(wrapper.fp32_partitioned_groups_flat[group], offset, start, count)
