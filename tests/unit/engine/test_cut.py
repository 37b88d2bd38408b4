"""What crosses a pipeline cut comes out as it went in."""

import pytest
import torch

from megavideo.engine.pipeline.cut import pack, unpack
from megavideo.layout.grid import Grid

GRID = Grid(text=4, frames=3, side=2)


@pytest.mark.parametrize("ranks", [1, 2], ids=["all-slots", "a-ranks-share-of-them"])
def test_streams_come_out_as_they_went_in_and_text_sends_no_gradient_back(ranks: int) -> None:
    text = torch.randn(2, GRID.text // ranks, 8)
    image = torch.randn(2, GRID.image_tokens // ranks, 8, requires_grad=True)
    length = torch.tensor([1, 4])
    states, sent_length = pack((text, image, length))
    received = states.detach().requires_grad_()
    got_text, got_image, got_length = unpack((received, sent_length), GRID)
    assert torch.equal(got_text, text) and torch.equal(got_image, image)
    assert torch.equal(got_length, length)
    got_image.sum().backward()
    assert not got_text.requires_grad
    assert received.grad is not None
    states.backward(received.grad)
    assert image.grad is not None and bool((image.grad == 1).all())
    assert int(received.grad.sum()) == image.numel()
