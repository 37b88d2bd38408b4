"""Checks of the published super-resolution models: states, logits and the tokens they fill in."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megavideo.superres.config import DirectConfig, IterativeConfig
from megavideo.superres.model import DirectSuperResolution, IterativeSuperResolution
from megavideo.superres.published import canonical_tensors
from megavideo.verify.compare import Row, compare

Arrays = Mapping[str, np.ndarray]
DTYPE = torch.float64


def superres_rows(case: str, meta: dict[str, Any], values: Arrays) -> Iterator[Row]:
    """Rows of a case of kind `dsr` or `itersr`."""
    compute = {"dsr": _direct, "itersr": _iterative}[meta["kind"]]
    with torch.no_grad():
        ours = compute(meta, values)
    for key, array in ours.items():
        if key in values:
            dtype = "float64" if values[key].dtype.kind == "f" else "exact"
            yield compare(case, key, array.numpy(), values[key], dtype)


def unchecked(values: Arrays) -> list[str]:
    """Arrays of a case that nothing is compared with."""
    known = {"meta_json", "seq0", "img_in", "out_tokens", "logits_level1", "logits_image"}
    left = [key for key in values if key not in known and not key.startswith("w.")]
    return [key for key in left if not key.endswith(".attn_out")]


def _direct(meta: dict[str, Any], values: Arrays) -> dict[str, Tensor]:
    config = DirectConfig(
        **_sizes(meta, values),
        coarse_side=meta["l0"],
        fine_side=meta["l1"],
        coarse_window=meta["kernel_size2"],
    )
    model = DirectSuperResolution(config).to(DTYPE)
    _load(model, values)
    norms = [layer.get_submodule("attention_norm") for layer in model.layers]
    states = {f"layer{index}.attn_out": _inputs_of(norm) for index, norm in enumerate(norms)}
    text, length = _text(values["seq0"][:, : meta["text_len"]], config.text_slots)
    coarse = torch.from_numpy(values["seq0"][:, meta["text_len"] :]).long()
    logits = model.logits(model(text, length, coarse))
    return {
        **{key: torch.cat(inputs(), 1) for key, inputs in states.items()},
        "logits_level1": logits,
        "out_tokens": logits.argmax(-1),
    }


def _iterative(meta: dict[str, Any], values: Arrays) -> dict[str, Tensor]:
    config = IterativeConfig(**_sizes(meta, values), fine_side=meta["l1"])
    model = IterativeSuperResolution(config).to(DTYPE)
    _load(model, values)
    text, length = _text(values["seq0"], config.text_slots)
    fine = torch.from_numpy(values["img_in"]).long()
    logits = model.logits(model(text, length, fine))
    filled = torch.where(fine == config.begin_of_image, logits.argmax(-1), fine)
    return {"logits_image": logits, "out_tokens": filled}


def _sizes(meta: dict[str, Any], values: Arrays) -> dict[str, Any]:
    return {
        "hidden": meta["h"],
        "heads": meta["nh"],
        "layers": meta["L"],
        "text_slots": meta["layout"][0],
        "vocab_size": len(values["w.transformer.word_embeddings.weight"]),
        "position_rows": len(values["w.transformer.position_embeddings.weight"]),
        "image_codes": meta["num_image_tokens"],
        "begin_of_image": meta["boi_id"],
        "window": meta["kernel_size"],
    }


def _load(model: nn.Module, values: Arrays) -> None:
    weights = {k[2:]: torch.from_numpy(v) for k, v in values.items() if k.startswith("w.")}
    model.load_state_dict(canonical_tensors(weights))


def _text(ids: np.ndarray, slots: int) -> tuple[Tensor, Tensor]:
    """All samples of a case have equally long texts: [B, slots] with padding on the left, [B]."""
    padded = np.pad(ids, ((0, 0), (slots - ids.shape[1], 0)))
    return torch.from_numpy(padded).long(), torch.full((len(ids),), ids.shape[1])


def _inputs_of(module: nn.Module) -> Callable[[], list[Tensor]]:
    seen: list[Tensor] = []
    module.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    return lambda: seen
