"""Checks of a SAT checkpoint: it loads whole, and a temporal channel inherits as published."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megavideo.checkpoint.formats.sat import canonical_name, read_sat
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.init import inherit, inherited_from
from megavideo.verify.compare import Row, compare, sizes

EXPECTED = "after_finetune_load.npz"


def checkpoint_rows(folder: Path) -> Iterator[Row]:
    """Load `folder` as the base of a video model; compare with what the published code had."""
    with np.load(folder / EXPECTED, allow_pickle=False) as file:
        after = {key: file[key] for key in file.files}
    meta = json.loads(bytes(after["meta_json"]))
    base = read_sat(folder)
    config = _config(meta, base)
    model = build_model(config, RecipeConfig(stage="keyframes", steps=1))
    parameters = canonical_parameters(model)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(base[name] if name in base else torch.zeros(()))
    inherit(parameters, config)
    for key in sorted(after.keys() - {"meta_json"}):
        ours = parameters[canonical_name(key.removeprefix("after."))].detach().numpy()
        yield compare(folder.name, key, ours, after[key], "exact")
    yield _loaded_row(folder.name, meta["changed_by_load"], set(base))


def _config(meta: dict[str, Any], base: dict[str, Tensor]) -> ModelConfig:
    rows = len(base["embedding.word"])
    return ModelConfig(
        **sizes(meta),
        vocab_size=rows,
        image_codes=rows - 1,
        pad=0,
        newline=0,
        begin_of_image=0,
        position_rows=len(base["embedding.position"]),
        frame_position_rows=meta["F"] * meta["FL"],
    )


def _loaded_row(case: str, changed_by_load: dict[str, bool], base: set[str]) -> Row:
    """Loading must change exactly the tensors that it changed in the published code."""
    names = sorted(changed_by_load)
    canonical = [canonical_name(name) for name in names]
    ours = [name in base or inherited_from(name) is not None for name in canonical]
    reference = [changed_by_load[name] for name in names]
    return compare(case, "tensors changed by loading", np.array(ours), np.array(reference), "exact")
