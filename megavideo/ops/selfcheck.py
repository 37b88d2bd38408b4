"""A look at the kernels on the device at hand before a run relies on them.

Continuous integration proves the kernels' source in an emulator; what compiler, driver and GPU make
of it shows only here. One small problem, compared with reference.py: milliseconds, once a run.
"""

from typing import Any

import torch
from torch import Tensor

from megavideo.layout.rules import Rule
from megavideo.ops import interval, reference

# Cut windows of one and of two tiles, a given and a causal frame, padded text.
RULE = Rule(frames=2, side=13, window=10, shift=5, two_way=True)
TEXT_SLOTS, TEXT_LENGTHS = 70, (1, 70)

# Relative to the largest value. Wrong tiles, masks or fragments give errors of order 1.
TOLERANCE = 0.03


def disagreement(
    library: Any, device: torch.device, dtype: torch.dtype, head_size: int, atomic: bool = False
) -> str:
    """In words, how the kernels differ from the reference; empty if they do not.

    `atomic`: check the backward pass in one pass (ops/interval.py), not that in two.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    batch, slots = len(TEXT_LENGTHS), RULE.frames * RULE.side**2
    image, text = draw(batch, slots, 3, 1, head_size), draw(batch, TEXT_SLOTS, 2, 1, head_size)
    given = (image, text, torch.tensor(TEXT_LENGTHS, device=device))
    grad = draw(batch, slots, head_size)
    out, lse = interval.forward(library, *given, RULE, 0.0, 0)
    grads = interval.backward(library, grad, *given, out, lse, RULE, 0.0, 0, atomic=atomic)
    ours = (out, lse, *grads)
    exact = _exact(grad, given)
    way = "atomic" if atomic else "deterministic"
    names = ("output", "lse", *(f"{way} gradient of {of}" for of in ("image", "text")))
    for name, value, expected in zip(names, ours, exact, strict=True):
        assert value is not None
        error = (value.double() - expected).abs().max() / expected.abs().max()
        if not error < TOLERANCE:
            return f"its {name} differs from the reference by {error:.2g}; please report this"
    return ""


def _exact(grad: Tensor, given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Output, lse, gradients of image and text in float64."""
    image, text, length = given
    wide = (image.double(), text.double(), length)
    out, lse = reference.forward(*wide, RULE, 0.0, 0)
    return out, lse, *reference.backward(grad.double(), *wide, lse, RULE, 0.0, 0)
