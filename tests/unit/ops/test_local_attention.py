"""The attention operator against one dense masked softmax, output and every gradient."""

import pytest
import torch
from torch import Tensor

from megavideo.layout.grid import Grid
from megavideo.layout.render import dense_mask
from megavideo.layout.rules import Rule, encode_rule, spatial_rule, temporal_rule, text_visible
from megavideo.ops.flex import flex_local_attention
from megavideo.ops.local_attention import local_attention
from megavideo.ops.sdpa import sdpa_local_attention

GRID = Grid(text=5, frames=3, side=4)
RULES = {
    "spatial-sequential": spatial_rule(GRID, "keyframes"),
    "spatial-interpolation": spatial_rule(GRID, "interpolation"),
    "temporal-full": temporal_rule(GRID, "keyframes", 0, 0),
    "temporal-w2": temporal_rule(GRID, "keyframes", 2, 0),
    "temporal-w2-shift1": temporal_rule(GRID, "keyframes", 2, 1),
    "temporal-w4-shift2-interpolation": temporal_rule(GRID, "interpolation", 4, 1),
}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    slots, heads, size = GRID.image_tokens, 3, 7
    image = torch.randn(2, slots, 3, heads, size, generator=generator, dtype=dtype)
    text = torch.randn(2, GRID.text, 2, heads, size, generator=generator, dtype=dtype)
    return image.requires_grad_(), text.requires_grad_(), torch.tensor([1, 4])


def dense_attention(image: Tensor, text: Tensor, length: Tensor, rule: Rule) -> Tensor:
    """One softmax over all keys with a dense mask: the definition."""
    q = image[:, :, 0]
    k, v = (torch.cat([text[:, :, i], image[:, :, i + 1]], 1) for i in (0, 1))
    real = text_visible(torch.arange(GRID.text), length[:, None], GRID.text)
    mask = torch.cat(
        [
            real[:, None].expand(-1, GRID.image_tokens, -1),
            torch.from_numpy(dense_mask(rule)).expand(2, -1, -1),
        ],
        2,
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    probability = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", probability, v).flatten(2)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_output_and_gradients_equal_a_dense_masked_softmax(rule: Rule) -> None:
    image, text, length = inputs()
    weight = torch.randn(2, GRID.image_tokens, 21, dtype=torch.float64)
    results = []
    for attend in (local_attention, dense_attention):
        out = attend(image, text, length, rule)
        grads = torch.autograd.grad((out * weight).sum(), (image, text))
        results.append((out.detach(), *grads))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_sdpa_per_block_computes_the_same_output_and_gradients(rule: Rule) -> None:
    image, text, length = inputs()
    weight = torch.randn(2, GRID.image_tokens, 21, dtype=torch.float64)
    for ours, expected in zip(
        *(
            torch.autograd.grad((attend(image, text, length, rule) * weight).sum(), (image, text))
            for attend in (sdpa_local_attention, dense_attention)
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    out = sdpa_local_attention(image, text, length, rule)
    torch.testing.assert_close(out, dense_attention(image, text, length, rule), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_flex_attention_computes_the_same(rule: Rule) -> None:
    image, text, length = (tensor.detach() for tensor in inputs(torch.float32))
    ours = flex_local_attention(image, text, length, rule)
    torch.testing.assert_close(ours, local_attention(image, text, length, rule), rtol=0, atol=1e-5)


def test_flex_attention_sees_text_that_fills_whole_blocks() -> None:
    """With more text than one mask block, padding must still be looked at slot by slot."""
    rule = Rule(frames=1, side=2)
    image = torch.randn(2, 4, 3, 1, 8)
    text, length = torch.randn(2, 300, 2, 1, 8), torch.tensor([7, 299])
    ours = flex_local_attention(image, text, length, rule)
    torch.testing.assert_close(ours, local_attention(image, text, length, rule), rtol=0, atol=1e-5)


def test_padding_never_matters() -> None:
    rule = RULES["temporal-full"]
    image, text, length = (tensor.detach() for tensor in inputs())
    garbage = text.clone()
    garbage[0, :4], garbage[1, :1] = 1e6, torch.nan_to_num(torch.tensor(1e300))
    before = local_attention(image, text, length, rule)
    assert torch.equal(before, local_attention(image, garbage, length, rule))


def test_dropout_drops_the_same_in_forward_and_backward() -> None:
    """With the seed fixed the operator is a smooth function, so its gradient can be checked."""
    rule = RULES["temporal-w2-shift1"]
    image, text, length = inputs()

    def seeded(image: Tensor, text: Tensor) -> Tensor:
        torch.manual_seed(3)
        return local_attention(image, text, length, rule, dropout=0.4)

    assert torch.autograd.gradcheck(seeded, (image, text), fast_mode=True)


def test_dropout_keeps_the_mean_and_follows_the_generator() -> None:
    rule = RULES["temporal-full"]
    image, text, length = (tensor.detach() for tensor in inputs())
    exact = local_attention(image, text, length, rule)
    torch.manual_seed(0)
    draws = torch.stack([local_attention(image, text, length, rule, 0.3) for _ in range(400)])
    torch.testing.assert_close(draws.mean(0), exact, rtol=0, atol=0.3)
    assert not torch.equal(draws[0], draws[1])
    torch.manual_seed(0)
    assert torch.equal(draws[0], local_attention(image, text, length, rule, 0.3))


def test_low_precision_inputs_are_computed_in_float32() -> None:
    rule = RULES["temporal-w2"]
    image, text, length = (tensor.detach() for tensor in inputs(torch.bfloat16))
    exact = local_attention(image.double(), text.double(), length, rule)
    ours = local_attention(image, text, length, rule)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_operator_passes_opcheck(dropout: float) -> None:
    image, text, length = inputs()
    arguments = (image, text, length, encode_rule(RULES["temporal-w2"]), dropout, torch.tensor(5))
    torch.library.opcheck(torch.ops.megavideo.local_attention.default, arguments)
