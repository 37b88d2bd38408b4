"""Frames that a checkpoint predicts, beside the real ones, decoded to pixels.

Prediction is greedy and one token ahead: each token is the most likely one given the real tokens
before it. It shows what the model has learned, not what it would generate on its own.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from megavideo.data.batch import Batch, open_stream
from megavideo.data.image_tokenizer import ImageTokenizer, frames_of
from megavideo.data.pictures import contact_sheet
from megavideo.data.text_tokenizer import TextTokenizer
from megavideo.engine.weights import load_model
from megavideo.layout.rules import loss_frames
from megavideo.model.build import stage_grid
from megavideo.report.runs import FinishedRun

Row = tuple[list[np.ndarray], str]


def draw_predictions(run: FinishedRun, tokenizer: ImageTokenizer, count: int) -> Image:
    """A contact sheet of `count` held-out samples: real frames, and predicted ones under them.

    Given frames, which carry no loss, are shown in grey in the predicted row.
    """
    model = load_model(run.config, run.checkpoint, torch.device("cpu"))
    text = TextTokenizer(run.config.data.text_tokenizer, run.config.model.image_codes)
    rows = []
    for batch in _samples(run, count):
        rows += _draw_sample(run, model, tokenizer, text, batch)
    frames, labels = zip(*rows, strict=True)
    return contact_sheet(frames, labels, scale=2)


def _samples(run: FinishedRun, count: int) -> Iterator[Batch]:
    data = run.config.data
    assert data.validation is not None
    stream = open_stream(data, run.config.model, run.config.recipe, data.validation)
    for batch, _ in stream.held_out_batches(count, 1, 0, 1):
        yield batch


def _draw_sample(
    run: FinishedRun,
    model: nn.Module,
    tokenizer: ImageTokenizer,
    text: TextTokenizer,
    batch: Batch,
) -> list[Row]:
    recipe, grid = run.config.recipe, stage_grid(run.config.model, run.config.recipe.stage)
    carries = loss_frames(recipe.stage, grid.frames)
    with torch.no_grad():
        logits = model((batch.text, batch.text_length, batch.image))
    predicted = batch.image[0].clone()
    predicted[list(carries)] = logits[0].argmax(-1)
    real = _pixels(tokenizer, batch.image[0], grid.side)
    shown = _pixels(tokenizer, predicted, grid.side)
    given = [frame for frame in range(grid.frames) if frame not in carries]
    for frame in given:
        shown[frame] = shown[frame].mean(-1, keepdims=True).astype(np.uint8)
    caption = text.decode(_caption(batch, text.newline))
    return [(list(real), f"{caption} (real)"), (list(shown), "predicted")]


def _caption(batch: Batch, newline: int) -> list[int]:
    """The ids behind the line break; all of them in stage image, whose text has no duration."""
    ids: list[int] = batch.text[0, -int(batch.text_length[0]) :].tolist()
    return ids[ids.index(newline) + 1 :] if newline in ids else ids


def _pixels(tokenizer: ImageTokenizer, tokens: Tensor, side: int) -> np.ndarray:
    with torch.no_grad():
        return frames_of(tokenizer.decode(tokens.unflatten(-1, (side, side))))
