"""Programs that compute local attention, each as its users would run it.

A contender is built once per problem, outside the timing, and gives a function of no arguments that
returns the image slots' output, [B, V, H*D]. What it may prepare beforehand is what a layout fixes
(masks, indices) or another model would have at hand (a packed sequence for the causal kernels).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megavideo.layout.intervals import intervals
from megavideo.layout.render import blocks, dense_mask
from megavideo.layout.rules import Rule, encode_rule
from megavideo.ops import library
from megavideo.ops.backends import library_obstacle
from megavideo.ops.cache import keep_code_private
from megavideo.ops.flex import flex_local_attention
from megavideo.ops.local_attention import local_attention as _registers_the_operator  # noqa: F401
from megavideo.ops.sdpa import sdpa_local_attention
from megavideo.ops.selfcheck import disagreement

SEED = 1
MASKED = -10000.0  # as the published model fills


class CannotRun(Exception):
    """Why a contender is not measured on a problem."""


@dataclass(frozen=True)
class Problem:
    """Inputs of one call; text is all real, so that causal kernels compute the same."""

    rule: Rule
    dropout: float
    image_qkv: Tensor
    text_kv: Tensor
    text_length: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """What gradients are taken of."""
        return self.image_qkv, self.text_kv

    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, V, D], k and v [B, H, T+V, D]."""
        q, k, v = self.image_qkv.permute(2, 0, 3, 1, 4)
        text_k, text_v = self.text_kv.permute(2, 0, 3, 1, 4)
        return q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)


@dataclass(frozen=True)
class Ready:
    """A contender on a problem: `forward()`, and the tensors of which it computes gradients."""

    forward: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]


def megavideo(problem: Problem, atomic: bool = False) -> Ready:
    """The fused kernels; `atomic`: backward in one pass, as MEGAVIDEO_ATTENTION_BACKWARD=atomic."""
    image = problem.image_qkv
    reason = library_obstacle(image.device.type, image.dtype, image.shape[-1], problem.dropout > 0)
    if atomic and not reason:
        reason = disagreement(library.load(), image.device, image.dtype, image.shape[-1], atomic)
    if reason:
        raise CannotRun(reason)
    rule, seed = encode_rule(problem.rule), torch.tensor(SEED)
    operator = torch.ops.megavideo.local_attention
    inputs = (problem.image_qkv, problem.text_kv, problem.text_length)
    how = (rule, problem.dropout, seed, "library", atomic)
    return Ready(lambda: operator(*inputs, *how)[0], inputs[:2])


def dense(problem: Problem) -> Ready:
    """The published model's way: all scores, masked, as a matrix in memory."""
    mask = _mask(problem.rule, problem.text_kv.shape[1], problem.image_qkv.device)

    def forward() -> Tensor:
        q, k, v = problem.qkv()
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        probability = F.dropout(scores.masked_fill(~mask, MASKED).softmax(-1), problem.dropout)
        return (probability @ v).transpose(1, 2).flatten(2)

    return Ready(forward, problem.leaves)


def sdpa_mask(problem: Problem) -> Ready:
    """torch's scaled_dot_product_attention with a boolean mask."""
    mask = _mask(problem.rule, problem.text_kv.shape[1], problem.image_qkv.device)

    def forward() -> Tensor:
        out = F.scaled_dot_product_attention(*problem.qkv(), mask, problem.dropout)
        return out.transpose(1, 2).flatten(2)

    return Ready(forward, problem.leaves)


def sdpa_blocks(problem: Problem) -> Ready:
    """The same, one call per block of slots that see each other, as ops/sdpa.py runs it."""
    if problem.dropout:
        raise CannotRun("has no dropout")
    inputs = (problem.image_qkv, problem.text_kv, problem.text_length)
    return Ready(lambda: sdpa_local_attention(*inputs, problem.rule), inputs[:2])


def sdpa_causal(problem: Problem, backend: SDPBackend | None) -> Ready:
    """The same, causal over text and image in one packed sequence: whole causal attention only."""
    if problem.rule != Rule(problem.rule.frames, problem.rule.side):
        raise CannotRun("is causal over everything")
    text = problem.text_kv.shape[1]
    prompt = torch.cat([torch.randn_like(problem.text_kv[:, :, :1]), problem.text_kv], 2)
    packed = torch.cat([prompt, problem.image_qkv], 1).detach().requires_grad_()
    q, k, v = packed.permute(2, 0, 3, 1, 4)

    def forward() -> Tensor:
        with sdpa_kernel(backend) if backend else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=problem.dropout, is_causal=True)
        return out.transpose(1, 2).flatten(2)[:, text:]

    return Ready(forward, (packed,))


def flex_raster(problem: Problem) -> Ready:
    """FlexAttention on slots in raster order, as ops/flex.py runs it."""
    _check_flex(problem)
    inputs = (problem.image_qkv, problem.text_kv, problem.text_length)
    return Ready(lambda: flex_local_attention(*inputs, problem.rule), inputs[:2])


def flex_permuted(problem: Problem, block: int, gather: bool) -> Ready:
    """FlexAttention on slots in the kernels' order; without `gather`, already brought into it."""
    _check_flex(problem)
    device, text = problem.image_qkv.device, problem.text_kv.shape[1]
    slots = intervals(problem.rule).slots
    order = torch.from_numpy(slots[slots >= 0]).to(device).long()
    back = order.argsort()
    mask = _permuted_mask(problem.rule, text, block, order)
    permuted = problem.image_qkv[:, order].detach().requires_grad_()

    def forward() -> Tensor:
        image = problem.image_qkv[:, order] if gather else permuted
        q, k, v = Problem(problem.rule, 0.0, image, problem.text_kv, problem.text_length).qkv()
        out = _compiled_flex()(q, k, v, block_mask=mask).transpose(1, 2).flatten(2)
        return out[:, back] if gather else out

    return Ready(forward, (problem.image_qkv if gather else permuted, problem.text_kv))


def varlen(problem: Problem) -> Ready:
    """torch's variable-length attention: a sequence per block, text copied in front of each.

    Given frames of the interpolation see each other whole, and the others follow them: two calls.
    """
    if problem.dropout:
        raise CannotRun("has no dropout")
    if problem.image_qkv.device.type != "cuda":
        raise CannotRun("needs a CUDA device")
    from torch.nn.attention.varlen import varlen_attn

    parts = sequences(problem)

    def forward() -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in problem.qkv())
        out = torch.empty_like(q)
        for part in parts:
            gathered = q[part.queries], k[part.keys], v[part.keys]
            result = varlen_attn(
                *gathered,
                part.query_ends,
                part.key_ends,
                part.max_queries,
                part.max_keys,
                window_size=(-1, 0 if part.causal else -1),
            )
            assert isinstance(result, Tensor)
            out = out.index_copy(0, part.queries, result)
        return out.unflatten(0, (len(problem.image_qkv), -1)).flatten(2)

    return Ready(forward, problem.leaves)


CONTENDERS: dict[str, Callable[[Problem], Ready]] = {
    "megavideo": megavideo,
    "megavideo atomic": partial(megavideo, atomic=True),
    "dense": dense,
    "sdpa mask": sdpa_mask,
    "sdpa blocks": sdpa_blocks,
    "sdpa cudnn causal": partial(sdpa_causal, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa flash causal": partial(sdpa_causal, backend=SDPBackend.FLASH_ATTENTION),
    "flex raster": flex_raster,
    "flex permuted 128": partial(flex_permuted, block=128, gather=True),
    "flex permuted 64": partial(flex_permuted, block=64, gather=True),
    "flex permuted 128, no gather": partial(flex_permuted, block=128, gather=False),
    "varlen": varlen,
}

# Their rows are in another order, so they cannot be compared with the reference.
REORDERED = {"flex permuted 128, no gather"}


@lru_cache(maxsize=8)
def _mask(rule: Rule, text: int, device: torch.device) -> Tensor:
    """bool [V, T+V]."""
    return F.pad(torch.from_numpy(dense_mask(rule)), (text, 0), value=True).to(device)


def _check_flex(problem: Problem) -> None:
    if problem.dropout:
        raise CannotRun("has no dropout")
    if problem.image_qkv.device.type != "cuda":
        raise CannotRun("has no gradients on a CPU")


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    keep_code_private()
    return torch.compile(flex_attention, dynamic=False)


def _permuted_mask(rule: Rule, text: int, block: int, order: Tensor):  # type: ignore[no-untyped-def]
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < text) | rule(order[q], order[(k - text).clamp(min=0)])

    queries = len(order)
    return create_block_mask(visible, None, None, queries, text + queries, str(order.device), block)


@dataclass(frozen=True)
class Sequences:
    """One call of variable-length attention: rows of q, rows of k and v, and where each ends."""

    queries: Tensor
    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    max_queries: int
    max_keys: int
    causal: bool


def sequences(problem: Problem) -> list[Sequences]:
    """The calls that make up `problem`: of given slots (not causal), and of the others."""
    given, others = [], []
    for block in blocks(problem.rule):
        frame = block.slots // problem.rule.side**2
        is_given = problem.rule.two_way & (frame % 2 == 0)
        first, rest = block.slots[is_given], block.slots[~is_given]
        if len(first):
            given.append((first, first))
        if len(rest):
            others.append((rest, np.concatenate([first, rest])))
    calls = [(given, False), (others, True)]
    return [_pack(problem, pairs, causal) for pairs, causal in calls if pairs]


def _pack(problem: Problem, pairs: list[tuple[np.ndarray, np.ndarray]], causal: bool) -> Sequences:
    batch, slots = problem.image_qkv.shape[:2]
    text = problem.text_kv.shape[1]
    rows = [(b * slots + q, b * (text + slots) + np.concatenate([np.arange(text), text + k]))
            for b in range(batch) for q, k in pairs]  # fmt: skip
    queries, keys = [q for q, _ in rows], [k for _, k in rows]
    device = problem.image_qkv.device
    return Sequences(
        torch.from_numpy(np.concatenate(queries)).to(device),
        torch.from_numpy(np.concatenate(keys)).to(device),
        _ends(queries).to(device),
        _ends(keys).to(device),
        max(map(len, queries)),
        max(map(len, keys)),
        causal,
    )


def _ends(sequences: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *map(len, sequences)]).astype(np.int32))
