"""Which backend is taken, and what is said about it."""

import logging
from collections.abc import Iterator

import pytest
import torch

from megavideo.ops import backends, library
from megavideo.ops.backends import atomic_backward, choose
from megavideo.ops.library import LibraryError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choices are made once a process: forget them, before and after."""
    monkeypatch.delenv("MEGAVIDEO_ATTENTION", raising=False)
    monkeypatch.delenv("MEGAVIDEO_ATTENTION_BACKWARD", raising=False)
    monkeypatch.delenv("MEGAVIDEO_ATTENTION_TABLE", raising=False)
    choose.cache_clear()
    yield
    choose.cache_clear()


def with_library(monkeypatch: pytest.MonkeyPatch, disagreement: str = "") -> None:
    monkeypatch.setattr(library, "load", lambda: object())
    monkeypatch.setattr(backends, "disagreement", lambda *given: disagreement)


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise LibraryError("no nvcc")

    monkeypatch.setattr(library, "load", load)


def test_the_kernels_are_taken_on_a_gpu_with_and_without_dropout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_library(monkeypatch)
    assert choose("cuda", torch.bfloat16, 64, True, "frames") == "library"
    assert choose("cuda", torch.float16, 128, False, "frames") == "library"


def test_what_the_kernels_cannot_do_goes_to_others_with_the_reason_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_library(monkeypatch)
    monkeypatch.setattr(logging.getLogger("megavideo"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="megavideo"):
        assert choose("cuda", torch.bfloat16, 32, False, "frames") == "flex"
        assert choose("cuda", torch.float32, 64, True, "frames") == "reference"
    assert (
        "flex; order by the default table, an expectation for GPUs; not library (needs head"
        in caplog.text
    )
    assert "not library (needs bfloat16 or float16); not flex (has no dropout)" in caplog.text


def test_a_missing_or_wrong_library_is_passed_over_and_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("megavideo"), "propagate", True)
    without_library(monkeypatch)
    with caplog.at_level(logging.INFO, logger="megavideo"):
        assert choose("cuda", torch.bfloat16, 64, False, "frames") == "flex"
        choose.cache_clear()
        with_library(monkeypatch, disagreement="its output differs")
        assert choose("cuda", torch.bfloat16, 64, False, "frames") == "flex"
    assert "not library (no nvcc)" in caplog.text
    assert "not library (its output differs)" in caplog.text


def test_a_cpu_takes_sdpa_for_float32_and_the_reference_for_the_rest() -> None:
    assert choose("cpu", torch.float32, 8, False, "frames") == "sdpa"
    assert choose("cpu", torch.float64, 8, False, "frames") == "reference"
    assert choose("cpu", torch.float32, 8, True, "frames") == "reference"


def test_one_variable_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAVIDEO_ATTENTION", "reference")
    assert choose("cpu", torch.float32, 8, False, "frames") == "reference"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fast", "MEGAVIDEO_ATTENTION=fast is none of library, flex, sdpa, reference"),
        ("library", "MEGAVIDEO_ATTENTION=library: needs a CUDA device"),
        ("sdpa", "MEGAVIDEO_ATTENTION=sdpa: needs float32 on a CPU"),
    ],
)
def test_a_backend_that_cannot_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv("MEGAVIDEO_ATTENTION", name)
    with pytest.raises(ValueError, match=message):
        choose("cpu", torch.float64, 64, False, "frames")


def test_the_backward_pass_is_deterministic_unless_atomic_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_library(monkeypatch)
    monkeypatch.setattr(logging.getLogger("megavideo"), "propagate", True)
    assert not atomic_backward()
    monkeypatch.setenv("MEGAVIDEO_ATTENTION_BACKWARD", "atomic")
    assert atomic_backward()
    with caplog.at_level(logging.INFO, logger="megavideo"):
        choose("cuda", torch.bfloat16, 64, True, "frames")
        choose("cpu", torch.float32, 64, False, "frames")
    assert "library, atomic backward (last bits of gradients vary" in caplog.text
    assert "sdpa, on which MEGAVIDEO_ATTENTION_BACKWARD=atomic has no effect" in caplog.text


def test_an_unknown_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAVIDEO_ATTENTION_BACKWARD", "fast")
    with pytest.raises(ValueError, match="BACKWARD=fast is neither deterministic"):
        choose("cpu", torch.float32, 64, False, "frames")


def test_atomic_is_refused_where_torch_must_be_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert not atomic_backward()
    monkeypatch.setenv("MEGAVIDEO_ATTENTION_BACKWARD", "atomic")
    with pytest.raises(ValueError, match="forbids that; unset one of the two"):
        atomic_backward()
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
    assert atomic_backward()
