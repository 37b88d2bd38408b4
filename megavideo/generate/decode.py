"""Cached decoding: the training model's own list of layers, one image token at a time.

The first pass runs text and given frames through the layers; every step after it runs one image
slot of each row, and no text: a channel's cache holds all that the slot may see. There is no second
model. (docs/generate.md 2.)

B rows, T text slots, F frames, N tokens per frame, K image codes.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from megavideo.generate.cache import ChannelCache, Cursor, TextWeight
from megavideo.generate.reference_compat import first_pass_rule, step_rule
from megavideo.layout.rules import Rule
from megavideo.model.block import Block
from megavideo.model.embed import Embedding
from megavideo.model.head import Head

# (logits [B, K], frame, position in it) -> codes int64 [B]
Draw = Callable[[Tensor, int, int], Tensor]


@dataclass(frozen=True)
class Prompts:
    """Text of each row: ids int64 [B, T], left-padded, and how many are real, int64 [B]."""

    text: Tensor
    length: Tensor


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: logits = g + scale * (c - g), g given the guider's text.

    `prompts` has a row for each of the prompts' rows; texts may be of other lengths.
    """

    prompts: Prompts
    scale: float


@dataclass(frozen=True)
class Decoding:
    """How frames are decoded, besides what a token is drawn by.

    Attributes:
        text_weight: added to the scores of text keys: in the spatial channel always, in the
            temporal one in steps only; in the guider's steps nowhere (as published).
        guidance: None decodes without.
        reference_compat: reproduce the published decoder where it departs from its training.
    """

    text_weight: float = 0.0
    guidance: Guidance | None = None
    reference_compat: bool = False


@torch.no_grad()  # not inference_mode: layouts cache index tensors that training uses too
def decode(
    model: nn.Sequential,
    prompts: Prompts,
    image: Tensor,
    given: Sequence[int],
    wanted: Sequence[int],
    draw: Draw,
    how: Decoding = Decoding(),
) -> Tensor:
    """Decode frames.

    Args:
        model: of any stage, in eval mode; `image` has as many frames as its samples.
        image: int64 [B, F, N]; only frames in `given` are read.
        wanted: frames to decode, in this order; the rules must let each see those before it.

    Over tensor-parallel ranks, every one of them must call it with the same arguments, and all get
    the same logits, to the bit, to draw from.

    Returns: `image` with the wanted frames filled in.
    Raises: ValueError if logits are not finite, from which anything might be drawn.
    """
    image = image.clone()
    decoder = _Decoder(model, prompts, how)
    with decoder.caches():
        decoder.first_pass(image, given)
        for frame in wanted:
            code: Tensor | None = None
            finite = torch.ones((), dtype=torch.bool, device=prompts.length.device)
            for position in range(image.shape[2]):
                logits = decoder.step(frame, position, code)
                finite &= logits.isfinite().all()  # asked once a frame: a GPU need not wait
                code = draw(logits, frame, position)
                image[:, frame, position] = code
            if not finite:
                raise ValueError(
                    f"the model's logits of frame {frame} are not all finite: try another "
                    "precision than its weights have, and look at guidance and text weight"
                )
    return image


class _Decoder:
    """A model with caches, and where in the sequence it is. With guidance, rows are doubled."""

    def __init__(self, model: nn.Sequential, prompts: Prompts, how: Decoding):
        embedding, *blocks, head = model
        assert isinstance(embedding, Embedding) and isinstance(head, Head)
        self.embedding, self.blocks, self.head = embedding, blocks, head
        self.how = how
        self.prompts = prompts if how.guidance is None else _stack(prompts, how.guidance.prompts)
        self.cursor = Cursor(np.arange(0))
        self.positions = embedding.image_positions()
        self.rows = head.rows()

    @contextmanager
    def caches(self) -> Iterator[None]:
        """Give every channel a cache, and take it away again."""
        rows = len(self.prompts.length)
        weight = torch.full((rows,), self.how.text_weight, dtype=torch.float64)
        none = torch.zeros_like(weight)
        steps = weight.clone()
        if self.how.guidance is not None:
            steps[rows // 2 :] = 0
        filled = []
        try:
            for block in self.blocks:
                assert isinstance(block, Block)
                for channel in block.attention.channels():
                    first = weight if channel.rule.own_frame else none
                    channel.cache = self._cache(channel.rule, TextWeight(first, steps))
                    filled.append(channel)
            yield
        finally:
            for channel in filled:
                channel.cache = None

    def _cache(self, rule: Rule, weight: TextWeight) -> ChannelCache:
        if self.how.reference_compat:
            return ChannelCache(step_rule(rule), first_pass_rule(rule), self.cursor, weight)
        return ChannelCache(rule, rule, self.cursor, weight)

    def first_pass(self, image: Tensor, given: Sequence[int]) -> None:
        """Fill the caches with text and the given frames of `image`, [B, F, N]."""
        frames, per_frame = list(given), image.shape[2]
        first = np.array(frames, np.int64)[:, None] * per_frame
        self.cursor.slots = (first + np.arange(per_frame)).flatten()
        self.cursor.first = True
        inputs = self._rows(self.embedding.shifted(image[:, frames]))
        self._run(self.prompts.text, inputs)
        self.cursor.first = False

    def step(self, frame: int, position: int, before: Tensor | None) -> Tensor:
        """Logits [B, K] of one token; `before` are the codes [B] before it in its frame."""
        rows, device = len(self.prompts.length), self.prompts.length.device
        if before is None:
            inputs = torch.full((rows, 1), self.embedding.model.begin_of_image, device=device)
        else:
            inputs = self._rows(before[:, None])
        self.cursor.slots = np.array(
            [frame * self.embedding.model.grid.tokens_per_frame + position]
        )
        no_text = self.prompts.text[:, :0]
        logits = self.head.logits(self._run(no_text, inputs)[:, 0], self.rows)
        if self.how.guidance is None:
            return logits
        conditional, guider = logits.chunk(2)
        return guider + self.how.guidance.scale * (conditional - guider)

    def _run(self, text: Tensor, inputs: Tensor) -> Tensor:
        """States [rows, n, h] of the cursor's slots after all layers.

        Args:
            text: int64 [rows, T] in the first pass, [rows, 0] after it.
            inputs: int64 [rows, n].
        """
        positions = self.positions[torch.from_numpy(self.cursor.slots).to(text.device)]
        length = self.prompts.length
        states = self.embedding.states(text, length, inputs.to(text.device), positions)
        streams = (*states, length)
        for block in self.blocks:
            streams = block(streams)
        return streams[1]

    def _rows(self, inputs: Tensor) -> Tensor:
        """The guider is given the same tokens."""
        return inputs if self.how.guidance is None else torch.cat([inputs, inputs])


def _stack(prompts: Prompts, guider: Prompts) -> Prompts:
    """Both prompts' rows below each other, padded on the left to the longer text."""
    width = max(prompts.text.shape[1], guider.text.shape[1])
    texts = [
        torch.nn.functional.pad(text, (width - text.shape[1], 0), value=0)
        for text in (prompts.text, guider.text)
    ]
    return Prompts(torch.cat(texts), torch.cat([prompts.length, guider.length]))
