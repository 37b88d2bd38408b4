"""The published training step on our parameters: what ours is a saving against.

It executes what the published code executes (counted by model/published_flops.py, with which a test
compares it): text computed and differentiated like images; scores of whole frames, windows or
sequences in memory, multiplied by a dense mask and lowered by 10,000 where it is 0, with the
published range trick (PB-relax); logits of all vocabulary rows at all slots, sliced afterwards.
Losses and gradients are ours.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavideo.config.schema import Config
from megavideo.layout.rules import Rule, text_visible
from megavideo.model.attention import Channel, DualAttention
from megavideo.model.block import Block
from megavideo.model.embed import Embedding
from megavideo.model.head import Head, TiedRows
from megavideo.model.layers import Streams, eager

MASKED = 10000.0
RELAX = 16.0  # scores are computed this much smaller, and brought back below their maximum


def check_published(config: Config) -> None:
    """Raises: ValueError for layers that are cut, and for the stage of the base."""
    parallel = config.parallel
    if parallel.tp > 1 or parallel.pp > 1 or parallel.zero == 3:
        raise ValueError(
            f"--against published runs whole layers: parallel.tp={parallel.tp}, "
            f"parallel.pp={parallel.pp}, parallel.zero={parallel.zero} cut them; use 1, 1 and at "
            "most 2"
        )
    if config.recipe.stage == "image":
        raise ValueError("--against published is about the video stages, not recipe.stage=image")


@contextmanager
def published(module: nn.Module) -> Iterator[None]:
    """While inside, `module`'s layers compute as published, on the same parameters, op by op."""
    layers = [layer for layer in module.modules() if type(layer) in _VARIANTS]
    for layer in layers:
        layer.__class__ = _VARIANTS[type(layer)]
    try:
        with eager(module):
            yield
    finally:
        for layer in layers:
            layer.__class__ = type(layer).__bases__[0]


class PublishedEmbedding(Embedding):
    """Both streams as one, text first, in the place of images; beside it, to say how long text is,
    the text."""

    def forward(self, batch: Streams) -> Streams:
        text, image, text_length = super().forward(batch)
        return text, torch.cat([text, image], 1), text_length


class PublishedAttention(DualAttention):
    """Both channels project all slots; scores are dense."""

    def whole(self, states: Tensor, text_length: Tensor) -> Tensor:
        """Of [B, T + V, h]."""
        rule = self.spatial.rule
        text = states.shape[1] - rule.frames * rule.side**2
        spatial = self._context(self.spatial, states, text_length, text, text_queries=True)
        new = self.spatial.dense(spatial, self.spatial.dense.bias)
        temporal = self._context(self.temporal, states, text_length, text, text_queries=False)
        temporal = self.temporal.dense(temporal, self.temporal.dense.bias)
        share = self.mixture.sigmoid()
        mixed = share * new[:, text:] + (1 - share) * temporal
        return torch.cat([new[:, :text], mixed], 1)

    def _context(
        self, channel: Channel, states: Tensor, text_length: Tensor, text: int, text_queries: bool
    ) -> Tensor:
        """[B, T + V or V, h], before the output projection."""
        q, k, v = channel.packed(states).permute(2, 0, 3, 1, 4)
        q = q / (math.sqrt(q.shape[-1]) * RELAX)
        slots = torch.arange(text, device=q.device)
        real = text_visible(slots, text_length[:, None], text)[:, None, None].to(q.dtype)
        of_text = q[:, :, 0 if text_queries else text :] @ k[:, :, :text].transpose(-1, -2)
        images = _image_context(channel, q, k, v, of_text[:, :, -(q.shape[2] - text) :], real)
        if not text_queries:
            return images.transpose(1, 2).flatten(2)
        scores = of_text[:, :, :text] * RELAX
        weights = _masked(scores, real).softmax(-1)
        texts = _dropped(channel, weights) @ v[:, :, :text]
        return torch.cat([texts, images], 2).transpose(1, 2).flatten(2)


def _image_context(
    channel: Channel, q: Tensor, k: Tensor, v: Tensor, of_text: Tensor, real: Tensor
) -> Tensor:
    """[B, H, V, D] of image queries over the slots of their group and over text.

    Args:
        of_text: [B, H, V, T], their scores with text.
        real: [B, 1, 1, T], 1 where text is.
    """
    slots, mask = _groups(channel.rule, q.device)
    text = q.shape[2] - slots.numel()
    grouped = [x[:, :, text:][:, :, slots] for x in (q, k, v)]  # [B, H, groups, slots, D]
    scores = _masked(grouped[0] @ grouped[1].transpose(-1, -2), mask.to(q.dtype))
    largest = scores.detach().amax((-2, -1), keepdim=True)
    with_text = (of_text[:, :, slots] - largest) * RELAX
    both = torch.cat([(scores - largest) * RELAX, _masked(with_text, real[:, :, None])], -1)
    weights = _dropped(channel, both.softmax(-1))
    of_group, of_text = weights.split([slots.shape[1], weights.shape[-1] - slots.shape[1]], -1)
    context = of_group @ grouped[2] + of_text @ v[:, :, None, :text]
    return context.flatten(2, 3)[:, :, slots.flatten().argsort()]


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    return scores * mask - MASKED * (1 - mask)


def _dropped(channel: Channel, weights: Tensor) -> Tensor:
    return F.dropout(weights, channel.dropout, channel.training)


@lru_cache(maxsize=16)
def _groups(rule: Rule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slots int64 [groups, n] that the published code takes together, and their mask [.., n, n].

    A group is a frame, a window through all frames of pictures rolled by the shift, or everything.
    """
    per_frame = rule.side**2
    slots = np.arange(rule.frames * per_frame)
    numbers = np.zeros_like(slots)
    if rule.own_frame:
        numbers = slots // per_frame
    elif rule.window:
        row, column = slots % per_frame // rule.side, slots % rule.side
        row, column = ((x - rule.shift) % rule.side // rule.window for x in (row, column))
        numbers = row * rule.side + column
    groups = np.stack([slots[numbers == number] for number in np.unique(numbers)])
    visible = rule(groups[:, :, None], groups[:, None, :])
    return torch.from_numpy(groups).to(device), torch.from_numpy(visible).to(device)


class PublishedBlock(Block):
    """One stream through attention and MLP."""

    def _taken(self, text: Tensor, image: Tensor) -> list[Tensor]:
        return [image]  # with text in it; the other is there to say how long that is

    def _attend(self, streams: Sequence[Tensor], text_length: Tensor) -> Sequence[Tensor]:
        (states,) = streams
        assert isinstance(self.attention, PublishedAttention)
        return [self.attention.whole(self.input_norm(states), text_length)]


class PublishedHead(Head):
    """Logits of the whole vocabulary at all slots, of which the loss takes its part."""

    def forward(self, streams: Streams) -> Tensor:
        text, states, _ = streams
        assert isinstance(self.rows, TiedRows)
        logits = F.linear(self.norm(states), self.rows.word)
        images = logits[:, text.shape[1] :, : self.codes].unflatten(1, (-1, self.per_frame))
        return images[:, self.frames].float()


_VARIANTS: dict[type[nn.Module], type[nn.Module]] = {
    Embedding: PublishedEmbedding,
    DualAttention: PublishedAttention,
    Block: PublishedBlock,
    Head: PublishedHead,
}
