"""Optimizer state in parameter shape, whatever ZeRO stage cuts it into.

torch's optimizer steps flat float32 tensors that DeepSpeed cuts out of the parameters. A `Fragment`
says where a piece of a parameter lies in one of them; everything here is told in fragments:

    ZeRO 0    the flat tensor is the parameter itself
    ZeRO 1-2  one flat tensor per parameter group and rank (`_hp_mapping`, set by DeepSpeed)
    ZeRO 3    one flat tensor per sub-group and rank, every parameter cut evenly over the ranks
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


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
        parameters: the trainable parameters by canonical name.
        device: where collectives take their tensors.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        wrapper: Any,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
    ):
        self._optimizer = optimizer
        self._device = device
        self._cut_over_ranks = wrapper is not optimizer
        self._shapes = {name: full_shape(p) for name, p in parameters.items()}
        self._fragments = {
            name: _fragment(p, optimizer, wrapper) for name, p in sorted(parameters.items())
        }

    def gather_weights(self) -> dict[str, Tensor]:
        """Float32 weights in parameter shape, on rank 0, empty elsewhere. All ranks call it."""
        return self._gather(None)

    def gather_moments(self) -> dict[str, Tensor]:
        """`NAME.exp_avg` and the like in parameter shape, on rank 0; empty elsewhere."""
        moments: dict[str, Tensor] = {}
        for key in self._moment_names():
            moments |= {f"{name}.{key}": t for name, t in self._gather(key).items()}
        return moments

    def restore(
        self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], updates: int
    ) -> None:
        """Set master weights and moments to what `gather_*` gave after `updates` updates.

        The parameters that the forward pass reads must hold these weights already.
        """
        for name, fragment in self._present():
            fragment.of(fragment.flat).copy_(_cut(weights[name], fragment))
        if updates and self._moment_names():
            self._restore_moments(moments)
            self._set_updates(updates)

    def _restore_moments(self, moments: Mapping[str, Tensor]) -> None:
        for name, fragment in self._present():
            state = self._state(fragment)
            for key in self._moment_names():
                if key not in state:  # the first fragment of this flat tensor
                    state[key] = torch.zeros_like(fragment.flat)
                fragment.of(state[key]).copy_(_cut(moments[f"{name}.{key}"], fragment))

    def _set_updates(self, updates: int) -> None:
        """Adam's bias correction counts updates: torch's per flat tensor, apex's per group."""
        if not isinstance(self._optimizer, torch.optim.AdamW):
            for group in self._optimizer.param_groups:
                group["step"] = updates
            return
        for _, fragment in self._present():
            count = torch.tensor(float(updates), device=fragment.flat.device)
            self._state(fragment)["step"] = count

    def _gather(self, key: str | None) -> dict[str, Tensor]:
        gathered = {}
        for name, fragment in self._fragments.items():
            whole = self._whole(name, fragment, key)
            if self._cut_over_ranks:
                # As integers, the sum with zeros keeps every bit, the sign of -0.0 too.
                dist.reduce(whole.view(torch.int32), dst=0)
            if dist.get_rank() == 0:
                gathered[name] = whole.view(self._shapes[name]).cpu()
        return gathered

    def _whole(self, name: str, fragment: Fragment | None, key: str | None) -> Tensor:
        """The parameter's full length, zero but for this rank's fragment."""
        whole = torch.zeros(self._shapes[name].numel(), device=self._device)
        if fragment is not None:
            source = fragment.flat if key is None else self._state(fragment).get(key)
            if source is not None:
                whole.narrow(0, fragment.start, fragment.count).copy_(fragment.of(source))
        return whole

    def _present(self) -> Iterator[tuple[str, Fragment]]:
        return ((name, f) for name, f in self._fragments.items() if f is not None)

    def _state(self, fragment: Fragment) -> dict[str, Tensor]:
        return self._optimizer.state[fragment.flat]

    def _moment_names(self) -> tuple[str, ...]:
        return () if isinstance(self._optimizer, torch.optim.SGD) else ("exp_avg", "exp_avg_sq")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The parameter's whole shape, also where ZeRO 3 has taken its values away."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _fragment(
    parameter: nn.Parameter, optimizer: torch.optim.Optimizer, wrapper: Any
) -> Fragment | None:
    """Where this rank's part of `parameter` lies; None if all of it is on other ranks."""
    if wrapper is optimizer:
        return Fragment(parameter, 0, 0, parameter.numel())
    if hasattr(parameter, "ds_id"):
        return _zero3_fragment(parameter, wrapper)
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
    master, param = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(flat, master.start, param.start, param.numel)


def _zero3_fragment(parameter: Any, wrapper: Any) -> Fragment | None:
    group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start = dist.get_rank() * length
    count = min(length, parameter.ds_numel - start)  # the last ranks' parts are padded
    if count <= 0:
        return None
    return Fragment(wrapper.fp32_partitioned_groups_flat[group], offset, start, count)


def _cut(whole: Tensor, fragment: Fragment) -> Tensor:
    return whole.reshape(-1).narrow(0, fragment.start, fragment.count)
