"""DeepSpeed's universal checkpoints: a file for every tensor of every trained parameter, whole.

    latest_universal                                     names the folder below
    global_step10_universal/zero/NAME/fp32.pt            the float32 weight, and how ranks cut it
    global_step10_universal/zero/NAME/exp_avg.pt, exp_avg_sq.pt, step.pt
    global_step10_universal/zero/optimizer_state.pt
    global_step10_universal/mp_rank_00_model_states.pt   counts, and in `module` the frozen weights
    global_step10_universal/zero_pp_rank_0_mp_rank_00_model_states.pt    counts, for ZeRO 3

DeepSpeed 0.19.8 restores from `zero` what its optimizer holds, and nothing else: frozen weights it
neither loads nor, with a pipeline, keeps. Here they are in `module`, where DeepSpeed's own
checkpoints have all weights, in their own type. NAME is DeepSpeed's name of the parameter in a
model of ours: the layer's place in the list of layers (0 the embedding, the last the head) and the
name within it, as `3.attention.temporal.qkv.weight`. Canonical names are read too.
(deepspeed/checkpoint/universal_checkpoint.py, ds_to_universal.py.)
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megavideo.checkpoint.formats.interface import MOMENTS, Reader, parameter_of
from megavideo.checkpoint.formats.pt_stream import (
    PtFile,
    check_same_names,
    named_errors,
    whole_spec,
)
from megavideo.checkpoint.formats.sat import SAFE_TYPES
from megavideo.checkpoint.manifest import training_from_text
from megavideo.checkpoint.tensor_stream import Stored, TensorSpec, joined
from megavideo.model.table import layer_of, shard_named
from megavideo.parallel.shard import REPLICATED

LATEST = "latest_universal"
ZERO = "zero"
OURS = "megavideo"  # our entry in their file: what theirs has no place for
STATES = {"fp32": "", **{moment[1:]: moment for moment in MOMENTS}}


class SubparamShape:
    """Stands for DeepSpeed's description of fused parameters, which is read but not needed."""


SAFE = [
    *SAFE_TYPES,
    (SubparamShape, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
]


def deepspeed_names(canonical: Iterable[str]) -> dict[str, str]:
    """DeepSpeed's names of parameters of one whole model, by canonical name."""
    names = list(canonical)
    blocks = {layer for layer in map(layer_of, names) if layer.startswith("layers.")}
    return {name: _deepspeed_name(name, len(blocks)) for name in names}


class UniversalReader(Reader):
    """Reads weights and moments, checking each tensor's checksum in its zip archive."""

    format = "universal"

    def __init__(self, path: Path):
        """Raises: ValueError if it is not whole, or its ranks do not fit each other."""
        self.path = path
        folder = _step_folder(path)
        ranks = [PtFile(file, SAFE) for file in sorted(folder.glob("mp_rank_*_model_states.pt"))]
        if not ranks:
            raise ValueError(f"{folder} holds no mp_rank_00_model_states.pt; copy all its files")
        self._opened = list(ranks)
        content = ranks[0].content
        self.training = training_from_text((content.get(OURS) or {}).get("training"))
        self._parts = self._trained(folder, _shapes(content))
        self._add_frozen(ranks)
        self.tensors = {name: self._spec(name) for name in self._parts}
        self.files = [file.path.relative_to(path) for file in self._opened]
        self.files += [f.relative_to(path) for f in folder.glob(f"{ZERO}/**/step.pt")]
        if (path / LATEST).is_file():
            self.files.append(Path(LATEST))

    def blocks(self, name: str) -> Iterator[Tensor]:
        parts = self._parts[name]
        shard = shard_named(parameter_of(name)) if len(parts) > 1 else REPLICATED
        return named_errors(joined(parts, shard, self.tensors[name]), f"{self.path}: {name}")

    def verify_files(self) -> None:
        for file in self._opened:
            file.verify_rest()

    def _trained(self, folder: Path, shapes: Mapping[str, Any]) -> dict[str, list[Stored]]:
        """What lies in `zero`; a flat tensor, which ZeRO 3 leaves, gets its shape from `shapes`."""
        given = [path.name for path in sorted((folder / ZERO).iterdir()) if path.is_dir()]
        names = _canonical_names(given)
        found = {}
        for given_name in given:
            for state, suffix in STATES.items():
                path = folder / ZERO / given_name / f"{state}.pt"
                if not path.is_file():
                    continue
                file = PtFile(path, SAFE)
                self._opened.append(file)
                content = file.content
                stored = file.stored(content if isinstance(content, Tensor) else content["param"])
                if isinstance(content, Tensor) and given_name in shapes:
                    spec = TensorSpec(stored.spec.dtype, tuple(shapes[given_name]))
                    stored = replace(stored, spec=spec)
                found[names[given_name] + suffix] = [stored]
        return found

    def _add_frozen(self, ranks: list[PtFile]) -> None:
        """Take in `module`, but for what has an optimizer's state or is in `zero` alone."""
        modules = [file.content.get("module") or {} for file in ranks]
        check_same_names([file.path for file in ranks], modules)
        names = _canonical_names(modules[0])
        for given, name in names.items():
            if name + MOMENTS[0] not in self._parts:
                pairs = zip(ranks, modules, strict=True)
                self._parts[name] = [file.stored(module[given]) for file, module in pairs]

    def _spec(self, name: str) -> TensorSpec:
        parts = self._parts[name]
        return parts[0].spec if len(parts) == 1 else whole_spec(self.path, name, parts)


def is_universal(folder: Path) -> bool:
    """Whether `folder` looks like a universal checkpoint (its root, or one step's folder)."""
    return (_step_folder(folder) / ZERO).is_dir()


def _step_folder(folder: Path) -> Path:
    latest = folder / LATEST
    return folder / latest.read_text().strip() if latest.is_file() else folder


def _shapes(content: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes of trained parameters by DeepSpeed's names: of one dictionary, or one a sub-group."""
    shapes = content.get("param_shapes") or {}
    groups = shapes if isinstance(shapes, list) else [shapes]
    return {name: shape for group in groups for name, shape in group.items()}


def _deepspeed_name(name: str, blocks: int) -> str:
    layer = layer_of(name)
    place = {"embedding": 0, "head": blocks + 1}.get(layer)
    if place is None:
        place = int(layer.split(".")[1]) + 1
    return f"{place}.{name.removeprefix(f'{layer}.')}"


def _canonical_names(given: Iterable[str]) -> dict[str, str]:
    """Canonical names by DeepSpeed's; which layer a number is shows in what the layer holds."""
    return {name: _canonical_name(name) for name in given}


def _canonical_name(given: str) -> str:
    found = re.match(r"(\d+)\.(.*)", given)
    if not found:
        return given
    place, rest = int(found[1]), found[2]
    if place == 0:
        return f"embedding.{rest}"
    return f"head.{rest}" if rest.startswith("norm.") else f"layers.{place - 1}.{rest}"
