"""Enlarging the frames of a video: each by itself, in batches, with draws that a seed fixes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megavideo.log import progress
from megavideo.sampling.randomness import uniforms
from megavideo.sampling.strategy import Strategy
from megavideo.superres.model import DirectSuperResolution, IterativeSuperResolution

BATCH = 12  # frames at once, as published
ROWS = 1024  # tokens drawn at once; each takes a row of `image_codes` numbers
TOP_CLUSTERS, CODE_TEMPERATURE = 6, 0.6

# CogView2's iterative model: in round t, from 1 to 6, fine slots whose tile entry is t or more are
# unknown again (the tile repeats over the frame), and are drawn from so many codes.
TOP_K = (40, 40, 40, 20, 20, 10)
TILE = (
    (-1, 0, 1, 2, 3, 4),
    (0, -1, 2, -1, -2, 5),
    (1, -2, 3, 4, 5, 6),
    (2, 3, 4, 5, -1, 1),
    (3, -1, -2, 0, -1, 2),
    (4, 5, 6, 1, 3, -2),
)


def direct_strategy(labels: Tensor | None, temperature: float = CODE_TEMPERATURE) -> Strategy:
    """CogVideo's: the 6 likeliest clusters, then a code at 0.6; `labels` int64 [image codes].

    Without labels a code is drawn at that temperature from all.
    """
    if labels is None:
        return Strategy(temperature=temperature)
    return Strategy(top_k=TOP_CLUSTERS, labels=labels, code_temperature=temperature)


@torch.no_grad()
def upsample(
    model: DirectSuperResolution,
    text: Sequence[int],
    frames: Tensor,
    strategy: Strategy,
    seed: int,
    purpose: str = "",
    batch: int = BATCH,
) -> Tensor:
    """Fine tokens int64 [F, M] of a video's frames int64 [F, N].

    The numbers that decide a frame's draws are a function of (seed, purpose, the frame's number),
    whatever the batch and the other frames.

    Args:
        text: ids of the caption; those that are more than the model's text slots are left out.
        strategy: how a token is drawn; see `direct_strategy`.
        purpose: names the video.

    Raises: ValueError if there is no text, or frames have another size than the model's.
    """
    config = model.config
    if frames.shape[1] != config.coarse_tokens:
        raise ValueError(
            f"frames of {frames.shape[1]} tokens: this super-resolution enlarges frames of "
            f"{config.coarse_side} x {config.coarse_side}"
        )
    device = model.embedding.word.device
    slots, length = _text_slots(text, config.text_slots, device)
    enlarged: list[Tensor] = []
    with progress("super-resolution", total=len(frames)) as advance:
        for part in frames.to(device).split(batch):
            states = model(slots.expand(len(part), -1), length.expand(len(part)), part)
            for state in states:
                name = f"{purpose}/superres/{len(enlarged)}"
                enlarged.append(_draw(model, state, strategy, seed, name))
                advance()
    return torch.stack(enlarged).to(frames.device)


@torch.no_grad()
def refine(
    model: IterativeSuperResolution,
    text: Sequence[int],
    frames: Tensor,
    seed: int,
    purpose: str = "",
    batch: int = BATCH,
) -> Tensor:
    """Fine tokens int64 [F, M] of `upsample` after six rounds of drawing a part of them anew.

    Args as for `upsample`. Raises: ValueError as `upsample`.
    """
    config = model.config
    if frames.shape[1] != config.fine_tokens:
        raise ValueError(
            f"frames of {frames.shape[1]} tokens: this super-resolution refines frames of "
            f"{config.fine_side} x {config.fine_side}"
        )
    device = model.embedding.word.device
    slots, length = _text_slots(text, config.text_slots, device)
    parts = list(frames.to(device).split(batch))
    with progress("refining", total=len(parts) * len(TOP_K)) as advance:
        for number, part in enumerate(parts):
            for round_number, top_k in enumerate(TOP_K, start=1):
                unknown = round_mask(config.fine_side, round_number).to(device)
                masked = part.masked_fill(unknown, config.begin_of_image)
                states = model(slots.expand(len(part), -1), length.expand(len(part)), masked)
                for row, state in enumerate(states[:, unknown]):
                    name = f"{purpose}/refine/{number * batch + row}/{round_number}"
                    drawn = _draw(model, state, Strategy(top_k=top_k), seed, name)
                    masked[row, unknown] = drawn
                part = masked
                advance()
            parts[number] = part
    return torch.cat(parts).to(frames.device)


def round_mask(side: int, round_number: int) -> Tensor:
    """bool [side * side]: fine slots that are unknown at the beginning of a round, from 1."""
    tile, line = torch.tensor(TILE), torch.arange(side) % len(TILE)
    return (tile[line[:, None], line] >= round_number).flatten()


def _draw(
    model: DirectSuperResolution | IterativeSuperResolution,
    states: Tensor,
    strategy: Strategy,
    seed: int,
    purpose: str,
) -> Tensor:
    """Codes int64 [S] of states [S, h]."""
    draws = torch.from_numpy(uniforms(seed, purpose, len(states))).to(states.device)
    rows = zip(states.split(ROWS), draws.split(ROWS), strict=True)
    return torch.cat([strategy(model.logits(part), draw) for part, draw in rows])


def _text_slots(text: Sequence[int], slots: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Text int64 [1, slots], padded with 0 on the left, and its length int64 [1]."""
    ids = list(text)[:slots]
    if not ids:
        raise ValueError("the caption has no tokens; super-resolution needs a text")
    padded = torch.tensor([[0] * (slots - len(ids)) + ids], device=device)
    return padded, torch.tensor([len(ids)], device=device)
