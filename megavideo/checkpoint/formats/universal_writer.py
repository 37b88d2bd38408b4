"""DeepSpeed's universal checkpoints written, frozen weights included (see universal.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megavideo.checkpoint.files import TensorEntry
from megavideo.checkpoint.formats.interface import (
    MOMENTS,
    Group,
    OpenGroup,
    Writer,
    by_layer,
    is_moment,
    parameter_of,
)
from megavideo.checkpoint.formats.pt_stream import STORAGES, PtSink, StandIn
from megavideo.checkpoint.formats.universal import LATEST, OURS, STATES, ZERO, deepspeed_names
from megavideo.checkpoint.manifest import Training, training_text
from megavideo.checkpoint.tensor_stream import TensorSpec
from megavideo.files import atomic_write
from megavideo.model.table import shard_named
from megavideo.model.trainable import is_trainable

# The release whose loader these files were tried with; it refuses a checkpoint without a version.
DEEPSPEED = "0.19.8"
MODULE = "mp_rank_00_model_states.pt"
MODULE_ZERO_3 = "zero_pp_rank_0_mp_rank_00_model_states.pt"  # where ZeRO 3 looks for the counts
STEP = "step.pt"
# The optimizer's parameter groups: DeepSpeed's loader restores as many as the file has, so there
# are as many as any run of ours has. They are empty: settings are the new run's.
GROUPS = 2


class UniversalWriter(Writer):
    """Writes a run's trained weights and moments below `zero`, and the other weights beside it."""

    format = "universal"

    def __init__(self, training: Training | None):
        self.training = training
        self._folder = f"global_step{training.progress.step if training else 0}_universal"

    def groups(self, tensors: Mapping[str, TensorSpec]) -> list[Group]:
        for name, spec in tensors.items():
            if spec.dtype not in STORAGES:
                raise ValueError(f"{name} has type {spec.dtype}; choose one with --dtype")
        names = deepspeed_names(parameter_of(name) for name in tensors)
        groups = []
        for layer in by_layer(filter(self._is_trained, tensors)).values():
            files = [self._file(name, names) for name in layer]
            files += [
                self._step_file(names[parameter_of(name)]) for name in layer if self._has_step(name)
            ]
            groups.append(Group(tuple(files), tuple(layer)))
        frozen = by_layer(name for name in tensors if not self._is_trained(name))
        if frozen:
            names_in_order = tuple(name for layer in frozen.values() for name in layer)
            groups.append(Group((f"{self._folder}/{MODULE}",), names_in_order))
        return groups

    def open(self, folder: Path, group: Group, tensors: Mapping[str, TensorSpec]) -> OpenGroup:
        names = deepspeed_names(parameter_of(name) for name in tensors)
        if not self._is_trained(group.tensors[0]):
            parts = {names[name]: StandIn(name, tensors[name]) for name in group.tensors}
            return OpenGroup([PtSink(folder / group.files[0], self._states(parts, tensors))])
        sinks = [
            PtSink(folder / self._file(name, names), _described(name, tensors[name]))
            for name in group.tensors
        ]
        steps = [folder / file for file in group.files if Path(file).name == STEP]
        return _Trained(sinks, steps, self.training.progress.updates if self.training else 0)

    def finish(self, folder: Path, entries: Mapping[str, TensorEntry]) -> None:
        (folder / self._folder / ZERO).mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / self._folder / ZERO / "optimizer_state.pt") as file:
            torch.save(self._optimizer_state(), file)
        specs = {name: entry.spec for name, entry in entries.items()}
        for path in (folder / self._folder / name for name in (MODULE, MODULE_ZERO_3)):
            if not path.exists():
                with atomic_write(path) as file:
                    torch.save(self._states({}, specs), file)
        with atomic_write(folder / LATEST) as file:
            file.write(self._folder.encode())

    def _is_trained(self, name: str) -> bool:
        if self.training is None:
            return False
        return is_moment(name) or is_trainable(name, self.training.stage)

    def _has_step(self, name: str) -> bool:
        return name.endswith(MOMENTS[0])

    def _file(self, name: str, names: Mapping[str, str]) -> str:
        parameter = parameter_of(name)
        state = next(s for s, suffix in STATES.items() if parameter + suffix == name)
        return f"{self._folder}/{ZERO}/{names[parameter]}/{state}.pt"

    def _step_file(self, deepspeed_name: str) -> str:
        return f"{self._folder}/{ZERO}/{deepspeed_name}/{STEP}"

    def _states(
        self, frozen: Mapping[str, StandIn], tensors: Mapping[str, TensorSpec]
    ) -> dict[str, Any]:
        """What DeepSpeed's engine reads of a rank's file, the frozen weights, and our record."""
        progress = self.training.progress if self.training else None
        names = deepspeed_names(name for name in tensors if not is_moment(name))
        order = sorted(filter(self._is_trained, names))
        trained = {names[name]: torch.Size(tensors[name].shape) for name in order}
        return {
            "module": dict(frozen),
            "param_shapes": trained,
            "buffer_names": [],
            "optimizer": None,
            "lr_scheduler": None,
            "global_steps": progress.step if progress else 0,
            "global_samples": progress.consumed_samples if progress else 0,
            "skipped_steps": progress.step - progress.updates if progress else 0,
            "dp_world_size": 1,
            "mp_world_size": 1,
            "ds_config": {},
            "ds_version": DEEPSPEED,
            OURS: {"training": training_text(self.training)},
        }

    def _optimizer_state(self) -> dict[str, Any]:
        """What ZeRO 0-2 read, and in `optimizer_state_dict` what ZERO 3 reads."""
        groups: list[dict[str, Any]] = [{"params": []} for _ in range(GROUPS)]
        step = torch.tensor(float(self.training.progress.updates if self.training else 0))
        return {
            "ds_version": DEEPSPEED,
            "param_groups": groups,
            "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": groups[:1]},
        }


class _Trained(OpenGroup):
    """Files of a layer's trained parameters, and the number of updates beside each."""

    def __init__(self, sinks: Sequence[PtSink], steps: Sequence[Path], updates: int):
        super().__init__(sinks)
        self._steps = steps
        self._updates = updates

    def close(self) -> None:
        super().close()
        for path in self._steps:
            torch.save(torch.tensor(float(self._updates)), path)


def _described(name: str, spec: TensorSpec) -> dict[str, Any]:
    """The tensor, and how DeepSpeed's loader has to cut it for tensor-parallel ranks."""
    shard = shard_named(parameter_of(name))
    described: dict[str, Any] = {"param": StandIn(name, spec)}
    if shard.dim is not None:
        described["cat_dim"] = shard.dim
    if shard.chunks > 1:
        described["param_n_sub_params"] = shard.chunks
    if shard.padded:
        described["vocab_tensor"] = True
    return described
