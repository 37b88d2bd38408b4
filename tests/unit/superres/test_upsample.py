"""Enlarging frames: what a frame's tokens depend on, and what they do not."""

import pytest
import torch
from torch import Tensor

from megavideo.sampling.strategy import Strategy
from megavideo.superres.upsample import TOP_K, direct_strategy, refine, round_mask, upsample
from tests.unit.superres.samples import DIRECT, ITERATIVE, direct, iterative

TEXT = [21, 25, 30]
ROUNDS = range(1, len(TOP_K) + 1)
LABELS = torch.arange(20) % 8


def frames(count: int = 5, tokens: int = DIRECT.coarse_tokens) -> Tensor:
    return torch.randint(20, (count, tokens), generator=torch.Generator().manual_seed(3))


def test_every_frame_is_enlarged_by_the_likeliest_tokens_at_temperature_0() -> None:
    model = direct()
    enlarged = upsample(model, TEXT, frames(), Strategy(temperature=0), seed=0)
    text, length = torch.tensor([[0, 0, *TEXT]]), torch.tensor([3])
    for coarse, fine in zip(frames(), enlarged, strict=True):
        logits = model.logits(model(text, length, coarse[None]))[0]
        assert torch.equal(logits.argmax(-1), fine)
    assert enlarged.shape == (5, 36)


@pytest.mark.parametrize("strategy", [direct_strategy(None), direct_strategy(LABELS)])
def test_draws_depend_on_seed_and_frame_but_not_on_the_batch(strategy: Strategy) -> None:
    model = direct()
    one = upsample(model, TEXT, frames(), strategy, seed=1, purpose="a", batch=1)
    all_at_once = upsample(model, TEXT, frames(), strategy, seed=1, purpose="a", batch=12)
    assert torch.equal(one, all_at_once)
    assert torch.equal(one[:2], upsample(model, TEXT, frames(2), strategy, seed=1, purpose="a"))
    for seed, purpose in ((2, "a"), (1, "b")):
        assert not torch.equal(one, upsample(model, TEXT, frames(), strategy, seed, purpose))
    still = upsample(model, TEXT, frames(1).repeat(2, 1), strategy, seed=1)
    assert not torch.equal(still[0], still[1])


def test_padding_of_the_caption_changes_nothing_and_long_captions_are_cut() -> None:
    model = direct()
    greedy = Strategy(temperature=0)
    fine = upsample(model, TEXT, frames(), greedy, seed=0)
    text, length = torch.tensor([[7, 9, *TEXT]]), torch.tensor([3])
    other = model.logits(model(text, length, frames()[:1])).argmax(-1)
    assert torch.equal(other[0], fine[0])
    long = [*TEXT, 31, 32, 33, 34]
    cut = upsample(model, long[: DIRECT.text_slots], frames(), Strategy(), seed=0)
    assert torch.equal(upsample(model, long, frames(), Strategy(), seed=0), cut)
    other_text = torch.tensor([[0, 0, 31, *TEXT[1:]]])
    states = [model(ids, length, frames()[:1]) for ids in (text, other_text)]
    assert not torch.equal(*states)


def test_a_token_depends_on_its_neighbourhood_alone() -> None:
    """In the first layer; later ones reach further. Text reaches a fine token through coarse."""
    layer, config = direct().layers[0], DIRECT
    for parameter in layer.parameters():
        parameter.data *= 0.3  # saturated probabilities would be exactly zero
    torch.manual_seed(0)
    coarse = torch.randn(1, 5 + config.coarse_tokens, 16, dtype=torch.float64)
    fine = torch.randn(1, 36, 16, dtype=torch.float64)
    visible = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    _, before = layer(coarse, fine, visible)
    fine[0, 35] = torch.randn(16)  # row 5, column 5: windows reach 4 rows and 2 columns
    _, after = layer(coarse, fine, visible)
    changed = (before != after).any(-1).view(6, 6)
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[1:, 3:] = True
    assert torch.equal(changed, expected)


def test_rounds_draw_anew_what_the_tile_says_and_keep_the_rest() -> None:
    masks = torch.stack([round_mask(ITERATIVE.fine_side, number) for number in ROUNDS])
    assert (masks[:-1] >= masks[1:]).all()  # fewer are unknown in each round
    assert masks.sum(1).tolist() == [23, 19, 15, 10, 6, 2]
    assert torch.equal(round_mask(8, 1).view(8, 8)[6:, :6], round_mask(6, 1).view(6, 6)[:2])
    start = frames(3, ITERATIVE.fine_tokens)
    refined = refine(iterative(), TEXT, start, seed=0)
    assert torch.equal(refined[:, ~masks[0]], start[:, ~masks[0]])
    assert (refined[:, masks[0]] != start[:, masks[0]]).float().mean() > 0.5
    assert refined.max() < ITERATIVE.image_codes
    assert torch.equal(refined, refine(iterative(), TEXT, start, seed=0, batch=2))
    assert not torch.equal(refined, refine(iterative(), TEXT, start, seed=1))


def test_a_round_replaces_only_unknown_tokens_and_sees_the_others() -> None:
    """With one code left to draw from, a round is the argmax where begin-of-image was put."""
    model, start = iterative(), frames(1, ITERATIVE.fine_tokens)
    text, length = torch.tensor([[0, 0, *TEXT]]), torch.tensor([3])
    expected = start.clone()
    for number in ROUNDS:
        unknown = round_mask(ITERATIVE.fine_side, number)
        masked = expected.masked_fill(unknown, ITERATIVE.begin_of_image)
        likeliest = model.logits(model(text, length, masked)).argmax(-1)
        expected = torch.where(unknown, likeliest, expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megavideo.superres.upsample.TOP_K", (1,) * len(TOP_K))
        assert torch.equal(refine(model, TEXT, start, seed=0), expected)


def test_frames_of_another_size_and_empty_captions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"frames of 9 tokens: .* enlarges frames of 2 x 2"):
        upsample(direct(), TEXT, frames(1, 9), Strategy(), seed=0)
    with pytest.raises(ValueError, match=r"frames of 4 tokens: .* refines frames of 6 x 6"):
        refine(iterative(), TEXT, frames(1), seed=0)
    with pytest.raises(ValueError, match="the caption has no tokens"):
        upsample(direct(), [], frames(), Strategy(), seed=0)
