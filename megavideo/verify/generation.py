"""Checks of a generation case: the logits of every step, and the tokens that are decoded."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megavideo.checkpoint.formats.sat import canonical_name
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.generate.decode import Decoding, Guidance, Prompts, decode
from megavideo.layout.grid import Grid
from megavideo.layout.render import dense_mask
from megavideo.layout.rules import spatial_rule
from megavideo.model.block import Block
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.embed import text_positions
from megavideo.verify.compare import Row, compare

Arrays = Mapping[str, np.ndarray]

STAGES = {1: "keyframes", 2: "interpolation"}


class GenerationCase:
    """One published call of the decoder, its sampler replaced by arg-max, repeated in float64.

    Frames stand in the order in which they are met: given ones first, as in stage 2's
    [given 0, 2, 4, new 1, 3].
    """

    def __init__(self, name: str, meta: dict[str, Any], weights: Arrays, values: Arrays):
        self.name, self.meta, self.values = name, meta, values
        self.text, self.per_frame = meta["text_len"], meta["FL"]
        frames = (values["seq_in"].shape[1] - self.text - 1) // self.per_frame
        self.order = list(range(frames))
        if meta["stage"] == 2:
            self.order = [*range(0, frames, 2), *range(1, frames, 2)]
        self.config, self.recipe = _configs(meta, frames, weights)
        self.model = _load(self.config, self.recipe, weights)
        self.ours = self._compute()

    def rows(self) -> Iterator[Row]:
        """One row for every array of the case that we compute too."""
        for key, ours in self.ours.items():
            if key in self.values:
                reference = self.values[key]
                if key == "position_ids":  # the published one goes on after the last slot
                    reference = reference[:, : ours.shape[1]]
                dtype = "float64" if reference.dtype.kind == "f" else "exact"
                yield compare(self.name, key, ours, reference, dtype)

    def unchecked(self) -> list[str]:
        """Arrays of the case that nothing is compared with."""
        known = {*self.ours, "meta_json", "seq_in", "guider_seq_in"}
        return [key for key in self.values if key not in known]

    def _compute(self) -> dict[str, np.ndarray]:
        logits: list[Tensor] = []
        passes = _record_passes(self.model, streams=2 if self.meta["guide"] else 1)

        def likeliest(row: Tensor, frame: int, position: int) -> Tensor:
            logits.append(row)
            return row.argmax(-1)

        given = self.meta["given"]
        prompts = self._prompts("seq_in", self.text)
        how = Decoding(self.meta["logw"], self._guidance(), reference_compat=True)
        image = decode(
            self.model, prompts, self._image(), self.order[:given], self.order[given:],
            likeliest, how,
        )  # fmt: skip
        body = image[:, self.order].flatten(1).numpy()
        steps = torch.stack(logits, 1).numpy()
        first = self.meta["n_strategy1"]  # steps drawn with the first of two sampler settings
        return {
            "tokens_out": np.concatenate([self.values["seq_in"][:, : self.text + 1], body], 1),
            "guided_logits_strategy1": steps[:, :first],
            "guided_logits_strategy2": steps[:, first:],
            "position_ids": self._positions(),
            "nar_mask": self._first_pass_mask(),
            "call_query_len": np.array(passes),
        }

    def _prompts(self, key: str, length: int) -> Prompts:
        text = torch.from_numpy(self.values[key][:, :length].astype(np.int64))
        return Prompts(text, torch.full((len(text),), length))

    def _guidance(self) -> Guidance | None:
        if not self.meta["guide"]:
            return None
        prompts = self._prompts("guider_seq_in", self.meta["gtext_len"])
        return Guidance(prompts, self.meta["guidance_alpha"])

    def _image(self) -> Tensor:
        """Tokens in natural order; -1 where they are to be decoded."""
        body = self.values["seq_in"][:, self.text + 1 :].astype(np.int64)
        image = torch.empty(len(body), len(self.order), self.per_frame, dtype=torch.int64)
        image[:, self.order] = torch.from_numpy(body).unflatten(1, (-1, self.per_frame))
        return image

    def _positions(self) -> np.ndarray:
        text = text_positions(torch.tensor([self.text]), self.text)[0].numpy()
        slots = np.arange(len(self.order) * self.per_frame).reshape(-1, self.per_frame)
        image = self.config.image_position + slots[self.order].flatten()
        return np.concatenate([text, image])[None]

    def _first_pass_mask(self) -> np.ndarray:
        """Text sees text; a causal frame sees text and what is before it."""
        frame = dense_mask(spatial_rule(Grid(self.text, 1, self.config.side), "keyframes"))
        mask = np.zeros((self.text + len(frame),) * 2, bool)
        mask[:, : self.text] = True
        mask[self.text :, self.text :] = frame
        return mask


def _configs(
    meta: dict[str, Any], frames: int, weights: Arrays
) -> tuple[ModelConfig, RecipeConfig]:
    positions = weights["mixins.extra_position_embedding.position_embeddings.weight"]
    model = ModelConfig(
        hidden=meta["h"],
        heads=meta["nh"],
        layers=meta["L"],
        text_slots=max(meta["text_len"], meta["gtext_len"]),
        frames=frames,
        side=round(meta["FL"] ** 0.5),
        vocab_size=meta["vocab"],
        image_codes=meta["num_image_tokens"],
        pad=0,
        newline=0,
        begin_of_image=meta["boi_id"],
        position_rows=len(weights["transformer.position_embeddings.weight"]),
        frame_position_rows=len(positions),
    )
    recipe = RecipeConfig(
        # `no_swin` leaves the temporal channel out, which makes it the text-to-image model.
        stage="image" if meta.get("no_swin") else STAGES[meta["stage"]],  # type: ignore[arg-type]
        window=0 if meta.get("no_swin") else max(meta["ws"], 0),
        steps=1,
    )
    return model, recipe


def _load(config: ModelConfig, recipe: RecipeConfig, weights: Arrays) -> nn.Sequential:
    model = build_model(config, recipe).double().eval()
    tensors = {canonical_name(k): torch.from_numpy(v) for k, v in weights.items() if _is_weight(k)}
    with torch.no_grad():
        for name, parameter in canonical_parameters(model).items():
            parameter.copy_(tensors[name])
    return model


def _is_weight(key: str) -> bool:
    return key != "meta_json"


def _record_passes(model: nn.Sequential, streams: int) -> list[int]:
    """How many tokens each sequence brings to each pass through the layers, in order.

    We run a prompt and its guider as two rows of one pass; the published code one after the other.
    """
    passes: list[int] = []

    def note(block: nn.Module, inputs: Any) -> None:
        text, image, length = inputs[0]
        real = length if text.shape[1] else torch.zeros_like(length)
        passes.extend((real.view(streams, -1)[:, 0] + image.shape[1]).tolist())

    block = model[1]
    assert isinstance(block, Block)
    block.register_forward_pre_hook(note)
    return passes
