"""Cached decoding is the training model: same logits, same tokens, in every stage."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megavideo.generate.decode import Decoding, Guidance, Prompts, decode
from megavideo.generate.places import places
from megavideo.generate.reference_compat import first_pass_rule, step_rule
from megavideo.layout.render import dense_mask
from megavideo.layout.rules import Rule, spatial_rule, temporal_rule
from tests.unit.generate.models import (
    MODEL,
    decode_greedily,
    frames_of,
    given_image,
    prompts,
    tiny_model,
)

CASES = [
    ("image", 0),
    ("keyframes", 0),
    ("keyframes", 2),
    ("interpolation", 2),
    ("interpolation", 4),
]
GUIDER = prompts(3, 2, seed=1)


def logits_of_training(model: nn.Sequential, text: Prompts, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model((text.text, text.length, image))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("stage", "window"), CASES)
def test_every_step_has_the_logits_of_the_whole_forward_pass(
    stage: str, window: int, guided: bool
) -> None:
    model = tiny_model(stage, window)
    how = Decoding(guidance=Guidance(GUIDER, 3.0) if guided else None)
    image, steps = decode_greedily(model, stage, 3, how)
    whole = logits_of_training(model, prompts(3, 6), image)
    if guided:
        guider = logits_of_training(model, GUIDER, image)
        whole = guider + 3.0 * (whole - guider)
    assert torch.allclose(steps, whole, rtol=0, atol=1e-5)
    assert torch.equal(image[:, frames_of(stage)[1]], whole.argmax(-1))
    given = frames_of(stage)[0]
    assert torch.equal(image[:, given], given_image(stage, 3)[:, given])


@pytest.mark.parametrize(("stage", "window"), CASES)
def test_tokens_do_not_depend_on_the_batch_or_on_padding(stage: str, window: int) -> None:
    model = tiny_model(stage, window)
    together, _ = decode_greedily(model, stage, 3)
    given, wanted = frames_of(stage)
    text = prompts(3, 6)
    for row in range(3):
        length = int(text.length[row])
        alone = Prompts(text.text[row : row + 1, -length:], text.length[row : row + 1])
        image = given_image(stage, 3)[row : row + 1]
        image = decode(model, alone, image, given, wanted, lambda x, frame, place: x.argmax(-1))
        assert torch.equal(image[0], together[row])


def test_a_model_is_left_without_caches() -> None:
    model = tiny_model("keyframes")
    image, _ = decode_greedily(model, "keyframes", 1)
    for block in model[1:-1]:
        assert all(channel.cache is None for channel in block.attention.channels())
    with pytest.raises(ZeroDivisionError):
        decode(model, prompts(1, 6), image, [0], [1], lambda *_: 1 / 0)
    logits_of_training(model, prompts(1, 6), image)


def test_logits_that_are_not_finite_draw_nothing() -> None:
    model = tiny_model("keyframes")
    next(iter(model[-1].parameters())).data[0] = torch.nan
    with pytest.raises(ValueError, match="logits of frame 1 are not all finite"):
        decode_greedily(model, "keyframes", 1)


def test_text_weight_is_added_to_text_scores() -> None:
    """Weight log(2) is as if every text key were there twice; -inf would remove the text."""
    model = tiny_model("image")
    _, plain = decode_greedily(model, "image", 1)
    _, heavy = decode_greedily(model, "image", 1, Decoding(text_weight=1.4))
    assert not torch.allclose(plain, heavy, atol=1e-2)
    _, without = decode_greedily(model, "image", 1, Decoding(text_weight=-1e4))
    other = Prompts(prompts(1, 6, seed=9).text, torch.tensor([6]))
    kept: list[Tensor] = []

    def keep(logits: Tensor, frame: int, position: int) -> Tensor:
        kept.append(logits)
        return logits.argmax(-1)

    decode(model, other, given_image("image", 1), [], [0], keep, Decoding(text_weight=-1e4))
    # The first token sees itself and text; with the text out of sight, any text does.
    assert torch.allclose(without[:, 0], torch.stack(kept, 1), atol=1e-4)


def rules() -> list[Rule]:
    grid = MODEL.grid
    return [
        spatial_rule(grid, "keyframes"),
        *(
            temporal_rule(grid, stage, window, layer)
            for stage in ("keyframes", "interpolation")
            for window in (0, 2, 4)
            for layer in (0, 1)
        ),
    ]


@pytest.mark.parametrize("rule", rules(), ids=str)
def test_a_run_of_places_holds_what_a_decoded_slot_sees(rule: Rule) -> None:
    kept = places(rule, 3)
    mask = dense_mask(rule)
    for slot in range(len(mask)):
        seen = {int(kept.place[k]) for k in mask[slot].nonzero()[0]}
        text = set(range(int(kept.begin[slot]), int(kept.begin[slot]) + 3))
        assert seen | text == set(range(int(kept.begin[slot]), int(kept.end[slot])))
    assert kept.longest == mask.sum(1).max() + 3


def test_published_departures_touch_shifted_windows_only() -> None:
    for rule in rules():
        if not rule.shift:
            assert first_pass_rule(rule) == step_rule(rule) == rule
    shifted = Rule(frames=5, side=9, window=3, shift=1, two_way=True)
    assert not (dense_mask(step_rule(shifted)) == dense_mask(shifted)).all()
    even = replace(shifted, side=8, window=4, shift=2)
    assert (dense_mask(step_rule(even)) == dense_mask(even)).all()
    wrapped = dense_mask(first_pass_rule(even))
    assert (wrapped >= dense_mask(even)).all() and wrapped[0, 7]  # opposite corners of row 0
