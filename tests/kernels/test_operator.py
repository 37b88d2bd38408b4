"""The operator that training calls, with emulated kernels where a GPU has the real ones."""

import pytest
import torch
from torch import Tensor

from megavideo.layout.rules import Rule, encode_rule
from megavideo.ops import library as library_module
from megavideo.ops import local_attention as operator_module
from megavideo.ops.local_attention import local_attention
from megavideo.ops.selfcheck import disagreement
from tests.kernels.attention_truth import true_attention
from tests.kernels.test_interval import TOLERANCE, library

RULE = Rule(2, 6, window=4, shift=2)


@pytest.fixture(autouse=True)
def emulated_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = library()
    monkeypatch.setattr(library_module, "load", lambda: kernels)
    monkeypatch.setattr(operator_module, "choose", lambda *situation: "library")


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    slots = RULE.frames * RULE.side**2
    image = torch.randn(2, slots, 3, 1, 64, generator=generator).to(dtype).requires_grad_()
    text = torch.randn(2, 5, 2, 1, 64, generator=generator).to(dtype).requires_grad_()
    return image, text, torch.tensor([2, 5])


@pytest.mark.parametrize(
    ("dropout", "way"), [(0.0, "deterministic"), (0.2, "deterministic"), (0.2, "atomic")]
)
def test_gradients_reach_both_inputs(
    monkeypatch: pytest.MonkeyPatch, dropout: float, way: str
) -> None:
    monkeypatch.setenv("MEGAVIDEO_ATTENTION_BACKWARD", way)
    image, text, length = inputs()
    torch.manual_seed(7)
    out = local_attention(image, text, length, RULE, dropout)
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, ()))
    wide = [tensor.detach().double().requires_grad_() for tensor in (image, text)]
    expected, _ = true_attention(wide[0], wide[1], length, RULE, dropout, seed)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    ours = torch.autograd.grad(out, (image, text), grad)
    exact = torch.autograd.grad(expected, wide, grad.double())
    for value, truth in zip((out, *ours), (expected, *exact), strict=True):
        tolerance = TOLERANCE[torch.bfloat16]
        torch.testing.assert_close(value.double(), truth, rtol=tolerance, atol=tolerance)
    assert (library_module.load().counters.added > 0) == (way == "atomic")


def test_text_that_needs_no_gradient_gets_none() -> None:
    image, text, length = inputs()
    out = local_attention(image, text.detach(), length, RULE)
    out.sum().backward()
    assert image.grad is not None and bool(image.grad.isfinite().all())
    assert text.grad is None


@pytest.mark.parametrize("atomic", [False, True], ids=["two_passes", "atomic"])
def test_the_operator_passes_opcheck(atomic: bool) -> None:
    image, text, length = inputs()
    arguments = (image, text, length, encode_rule(RULE), 0.2, torch.tensor(5), "library", atomic)
    torch.library.opcheck(torch.ops.megavideo.local_attention.default, arguments)


@pytest.mark.parametrize(("head_size", "atomic"), [(64, False), (128, False), (128, True)])
def test_selfcheck_accepts_these_kernels(head_size: int, atomic: bool) -> None:
    device = torch.device("cpu")
    assert disagreement(library(), device, torch.bfloat16, head_size, atomic) == ""


def test_selfcheck_refuses_sums_that_were_never_made() -> None:
    class NoWorkspace:
        """Says that a single pass needs a workspace and then leaves it alone."""

        def __getattr__(self, name: str) -> object:
            def call(problem, stream=None):  # type: ignore[no-untyped-def]
                if name == "megavideo_interval_backward":
                    return 0
                given = (problem,) if name == "megavideo_interval_workspace" else (problem, stream)
                return getattr(library(), name)(*given)

            return call

    reason = disagreement(NoWorkspace(), torch.device("cpu"), torch.bfloat16, 64, atomic=True)
    assert "its atomic gradient of image differs" in reason


@pytest.mark.parametrize("field", ["begin", "end", "seen_by", "text_length"])
def test_selfcheck_refuses_kernels_that_read_a_layout_wrongly(field: str) -> None:
    class Wrong:
        """Forwards calls with one array of the layout replaced by zeros."""

        def __getattr__(self, name: str) -> object:
            def call(problem, stream):  # type: ignore[no-untyped-def]
                zeros = torch.zeros(4096, dtype=torch.int64)
                if field == "text_length":
                    zeros += 1
                setattr(problem._obj, field, zeros.data_ptr())
                return getattr(library(), name)(problem, stream)

            return call

    reason = disagreement(Wrong(), torch.device("cpu"), torch.bfloat16, 64)
    assert "differs from the reference" in reason
