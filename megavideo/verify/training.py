"""Checks of a training case: sample, masks, hidden states, logits, loss and every gradient."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.checkpoint.formats.sat import canonical_name
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.data.batch import Batch, collate
from megavideo.layout.render import dense_mask
from megavideo.layout.rules import Rule, loss_frames, spatial_rule, temporal_rule
from megavideo.model.block import Block
from megavideo.model.build import build_model, canonical_parameters
from megavideo.model.embed import Embedding, text_positions
from megavideo.model.head import Head, frame_losses
from megavideo.model.trainable import mark_trainable
from megavideo.verify.compare import Row, compare, sizes

Arrays = Mapping[str, np.ndarray]
Quantities = dict[str, Tensor | np.ndarray]
Record = dict[str, list[Tensor]]

STAGES = {1: "keyframes", 2: "interpolation"}


class TrainingCase:
    """One published forward and backward pass, repeated by our model in the case's precision."""

    def __init__(self, name: str, meta: dict[str, Any], weights: Arrays, values: Arrays):
        self.name = name
        self.values = values
        self.dtype = str(meta["dtype"])
        self.config, self.recipe = _configs(meta, weights)
        self.loss_frames = loss_frames(self.recipe.stage, self.config.frames)
        self.batch = _batch(values["in.rows_int32"], self.config)
        self.model = _load(self.config, self.recipe, weights, getattr(torch, self.dtype))
        self.records = _record(self.model)
        self.ours = self._compute()

    def rows(self) -> Iterator[Row]:
        """One row for every array of the case that we compute too."""
        for key, ours in self.ours.items():
            if key in self.values:
                reference = self.values[key]
                dtype = self.dtype if reference.dtype.kind == "f" else "exact"
                array = ours.detach().numpy() if isinstance(ours, Tensor) else ours
                yield compare(self.name, key, array, reference, dtype)

    def unchecked(self) -> list[str]:
        """Arrays of the case that nothing is compared with; inputs reach us through `tokens`."""
        keys = [key for key in self.values if key not in self.ours]
        return [key for key in keys if not key.startswith("in.") and key != "meta_json"]

    def _compute(self) -> Quantities:
        logits = self.model((self.batch.text, self.batch.text_length, self.batch.image))
        losses = frame_losses(logits, self.batch.image, self.loss_frames)
        losses.mean().backward()
        return {
            **self._sample(),
            **self._masks(),
            **self._states(),
            "loss": losses.mean(),
            **self._losses(),
            **self._gradients(),
        }

    def _sample(self) -> Quantities:
        embedding, batch, grid = self.model[0], self.batch, self.config.grid
        assert isinstance(embedding, Embedding)
        count = len(batch.text)
        image_positions = torch.arange(grid.image_tokens) + self.config.image_position
        carries = torch.zeros(grid.frames, grid.tokens_per_frame)
        carries[list(self.loss_frames)] = 1
        mask = torch.cat([torch.zeros(grid.text), carries.flatten()])
        return {
            "tokens": torch.cat([batch.text, embedding.shifted(batch.image)], 1),
            "labels": _labels(batch, self.config),
            "position_ids": torch.cat(
                [
                    text_positions(batch.text_length, grid.text),
                    image_positions.expand(count, -1),
                ],
                1,
            ),
            "loss_mask": mask.expand(count, -1),
        }

    def _masks(self) -> Quantities:
        if not any(key.startswith(("mask.", "vis.")) for key in self.values):
            return {}
        grid, recipe = self.config.grid, self.recipe
        masks: Quantities = {
            "mask.local_sequential": _per_frame(spatial_rule(grid, "keyframes")),
            "mask.local_interp": _per_frame(spatial_rule(grid, "interpolation")),
            "mask.temporal_full": dense_mask(temporal_rule(grid, "keyframes", 0, 0)),
        }
        for layer, name, shift in ((0, "even", "noshift"), (1, "odd", "shift")):
            if recipe.window:
                rule = temporal_rule(grid, recipe.stage, recipe.window, layer)
                masks[f"vis.temporal_{name}"] = dense_mask(rule)
                for short, stage in (("seq", "keyframes"), ("interp", "interpolation")):
                    rule = temporal_rule(grid, stage, recipe.window, layer)
                    masks[f"mask.temporal_{short}_{shift}"] = _in_windows(rule)
        return masks

    def _states(self) -> Quantities:
        states: Quantities = {}
        for index, record in enumerate(self.records):
            states[f"hidden.{index}"] = torch.cat(record["hidden"][:2], 1)
            states[f"layer{index}.attn_in"] = torch.cat(record["attn_in"], 1)
            states[f"layer{index}.attn_out"] = torch.cat(record["attn_out"], 1)
            states[f"layer{index}.ctx_text"] = record["ctx_spatial"][0]
            states[f"layer{index}.ctx_spatial"] = record["ctx_spatial"][1]
            states[f"layer{index}.ctx_temporal"] = record["ctx_temporal"][0]
        return states

    def _losses(self) -> Quantities:
        """Logits of every slot and vocabulary row, losses of every frame: more than is trained."""
        embedding, *_, head = self.model
        grid = self.config.grid
        assert isinstance(embedding, Embedding) and isinstance(head, Head)
        states = torch.cat(self.records[-1]["hidden"][:2], 1)
        logits = F.linear(head.norm(states), embedding.word)
        image = logits[:, grid.text :, : self.config.image_codes].unflatten(1, (grid.frames, -1))
        losses = frame_losses(image, self.batch.image, range(grid.frames))
        short = "AR" if self.recipe.stage == "keyframes" else "ITP"
        return {
            "logits": logits,
            **{f"log.{short}_f{frame}_loss": loss for frame, loss in enumerate(losses)},
        }

    def _gradients(self) -> Quantities:
        parameters = canonical_parameters(self.model)
        gradients: Quantities = {}
        for key in self.values:
            if key.startswith("grad."):
                gradient = parameters[canonical_name(key.removeprefix("grad."))].grad
                gradients[key] = torch.empty(0) if gradient is None else gradient
        return gradients


def _configs(meta: dict[str, Any], weights: Arrays) -> tuple[ModelConfig, RecipeConfig]:
    model = ModelConfig(
        **sizes(meta),
        vocab_size=meta["vocab"],
        image_codes=meta["num_image_tokens"],
        pad=meta["pad_id"],
        newline=meta["pad_id"] + 1,
        begin_of_image=meta["boi_id"],
        position_rows=len(weights["transformer.position_embeddings.weight"]),
        frame_position_rows=len(
            weights["mixins.extra_position_embedding.position_embeddings.weight"]
        ),
    )
    recipe = RecipeConfig(
        stage=STAGES[meta["stage"]],  # type: ignore[arg-type]
        window=max(meta["ws"], 0),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        steps=1,
    )
    return model, recipe


def _batch(rows: np.ndarray, config: ModelConfig) -> Batch:
    """The published data set's rows: text with padding anywhere, then the image tokens."""
    grid = config.grid
    texts = [[int(t) for t in row[: grid.text] if t != config.pad] for row in rows]
    frames = rows[:, grid.text :].reshape(len(rows), grid.frames, -1)
    return collate(texts, list(frames), grid.text, config.pad)


def _labels(batch: Batch, config: ModelConfig) -> Tensor:
    """labels[p] is the raw sequence's token p+1, as the published data set defines it."""
    start = torch.full((len(batch.text), 1), config.begin_of_image)
    return torch.cat([batch.text, start, batch.image.flatten(1)], 1)[:, 1:]


def _load(
    config: ModelConfig, recipe: RecipeConfig, weights: Arrays, dtype: torch.dtype
) -> nn.Sequential:
    model = build_model(config, recipe).to(dtype)
    parameters = canonical_parameters(model)
    tensors = {canonical_name(k): v for k, v in weights.items() if k != "meta_json"}
    assert tensors.keys() == parameters.keys(), tensors.keys() ^ parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(tensors[name]))
    mark_trainable(parameters, recipe.stage)
    return model


def _record(model: nn.Sequential) -> list[Record]:
    """Per block, what its parts see or say; each part is called for text first, then for images."""
    records: list[Record] = []
    for block in list(model)[1:-1]:
        assert isinstance(block, Block)
        record: Record = defaultdict(list)
        block.register_forward_hook(_keep_output(record, "hidden"))
        block.input_norm.register_forward_hook(_keep_output(record, "attn_in"))
        block.attention.register_forward_hook(_keep_output(record, "attn_out"))
        block.attention.spatial.dense.register_forward_hook(_keep_input(record, "ctx_spatial"))
        block.attention.temporal.dense.register_forward_hook(_keep_input(record, "ctx_temporal"))
        records.append(record)
    return records


def _keep_output(record: Record, key: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        record[key] += [tensor.detach() for tensor in outputs]

    return hook


def _keep_input(record: Record, key: str) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, inputs, output: record[key].append(inputs[0].detach())


def _per_frame(rule: Rule) -> np.ndarray:
    """[F, N, N]: who sees whom inside each frame."""
    per_frame = rule.side * rule.side
    mask = dense_mask(rule).reshape(rule.frames, per_frame, rule.frames, per_frame)
    return np.stack([mask[frame, :, frame] for frame in range(rule.frames)])


def _in_windows(rule: Rule) -> np.ndarray:
    """The mask inside each rolled window, slots ordered by frame, row, column in the window.

    [windows, n, n]; or [n, n] of the first window where all are alike because nothing is shifted.
    """
    per_axis, width = rule.side // rule.window, rule.window
    lines = (np.arange(rule.side) + rule.shift).reshape(per_axis, width) % rule.side
    frames = np.arange(rule.frames) * rule.side * rule.side
    mask = dense_mask(rule)
    windows = []
    for rows in lines:
        for columns in lines:
            slots = frames[:, None, None] + rows[:, None] * rule.side + columns
            windows.append(mask[np.ix_(slots.ravel(), slots.ravel())])
    return np.stack(windows) if rule.shift else windows[0]
