"""The CUDA source of neighbourhood attention, emulated, against a dense softmax in float64."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megavideo.layout.neighbourhood import NeighbourhoodRule
from megavideo.layout.rules import text_visible
from megavideo.ops import library as library_module
from megavideo.ops import neighbourhood
from megavideo.ops import neighbourhood_attention as operator_module
from megavideo.ops.neighbourhood_attention import neighbourhood_attention
from tests.kernels.dropout_bits import kept_bits
from tests.kernels.emulated import KERNELS, SCHEDULES, Emulator, Schedule, build
from tests.kernels.watched import WatchedLibrary

SOURCES = [
    KERNELS / "library.cu",
    *sorted((KERNELS / "local_attention").glob("neighbourhood*.cu")),
]

# One rounding of inputs' products (P, dS) and one of the result, relative to sums of order 1 to 4.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
LSE_TOLERANCE = 1e-5  # float32 all the way
SEED = 0x0FED_CBA9_8765_4321


@lru_cache
def emulator() -> Emulator:
    return Emulator(build(SOURCES))


def library(schedule: Schedule = "skewed") -> WatchedLibrary:
    return WatchedLibrary(emulator(), schedule)


@dataclass(frozen=True)
class Case:
    rules: tuple[NeighbourhoodRule, ...]
    text: int = 0
    lengths: tuple[int, ...] = (1,)
    heads: int = 1
    size: int = 64
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0

    def __str__(self) -> str:
        first = self.rules[0]
        batch = f"B{len(self.lengths)}-T{self.text}-H{self.heads}-D{self.size}"
        windows = [
            f"{r.key_rows}x{r.key_columns}w{r.window_rows}x{r.window_columns}" + "c" * r.causal
            for r in self.rules
        ]
        drop = f"-drop{self.dropout}" * bool(self.dropout)
        dtype = str(self.dtype).split(".")[1]
        return f"{batch}-{first.rows}x{first.columns}-{'-'.join(windows)}{drop}-{dtype}"

    def inputs(self) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """query, grids, text_kv, text_length."""
        generator = torch.Generator().manual_seed(1)
        batch = len(self.lengths)

        def draw(*shape: int) -> Tensor:
            shape = (batch, *shape, self.heads, self.size)
            return torch.randn(shape, generator=generator).to(self.dtype)

        grids = [draw(rule.keys, 2) for rule in self.rules]
        return draw(self.rules[0].queries), grids, draw(self.text, 2), torch.tensor(self.lengths)

    def grad(self) -> Tensor:
        shape = (len(self.lengths), self.rules[0].queries, self.heads * self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(self.dtype)


def same(rows: int, columns: int, *window: int, causal: bool = False) -> NeighbourhoodRule:
    return NeighbourhoodRule(rows, columns, rows, columns, *window, causal=causal)


CASES = [
    Case((same(12, 12, 9, 5),), text=16, lengths=(16,), heads=2),  # iterated super-resolution
    Case((same(12, 12, 9, 5), NeighbourhoodRule(12, 12, 4, 4, 5, 5))),  # direct super-resolution
    Case((same(9, 11, 5, 5),), text=5, lengths=(2, 5)),
    Case((same(10, 9, 9, 9, causal=True),)),
    Case((same(17, 16, 17, 17),)),  # the keys of a block fill two strips
    Case((same(1, 1, 3, 3),), text=1, lengths=(1,)),
    Case((NeighbourhoodRule(8, 12, 4, 3, 3, 1, causal=True),), text=70, lengths=(67, 9)),
    Case((same(9, 11, 5, 7),), dtype=torch.float16, text=3, lengths=(3,)),
    Case((same(6, 9, 3, 5),), size=128, text=9, lengths=(4,)),
    Case(
        (same(12, 12, 9, 5), NeighbourhoodRule(12, 12, 4, 4, 5, 5)), size=128, dtype=torch.float16
    ),
    Case((same(9, 11, 5, 5),), text=5, lengths=(2, 5), heads=2, dropout=0.1),
    Case(
        (same(6, 6, 3, 5), NeighbourhoodRule(6, 6, 2, 3, 1, 3)), text=5, lengths=(5,), dropout=0.5
    ),
    Case((same(9, 4, 3, 3),), size=128, dtype=torch.float16, dropout=0.2),
]

# The two published models' sizes: iterated and direct super-resolution, 20x20 to 60x60.
OWN, COARSE = same(60, 60, 9, 5), NeighbourhoodRule(60, 60, 20, 20, 5, 5)
PUBLISHED = [Case((OWN,), text=16, lengths=(16, 3)), Case((OWN, COARSE), dropout=0.1)]

# A patch sees 12 columns, or 8 at a border; a 9x5 window has 6 there, which costs extra passes.
WITHOUT_CONFLICTS = Case((same(24, 24, 9, 9),))


def run(case: Case, kernels: Any, device: str = "cpu") -> dict[str, Tensor]:
    """Output, lse and gradients."""
    query, grids, text, length = case.inputs()
    on_device = [kv.to(device) for kv in grids]
    given = (query.to(device), on_device, text.to(device), length.to(device))
    rest = (case.rules, case.dropout, SEED)
    out, lse = neighbourhood.forward(kernels, *given, *rest)
    grad = case.grad().to(device)
    grad_query, grad_grids, grad_text = neighbourhood.backward(
        kernels, grad, *given, out, lse, *rest
    )
    named = {f"grad_grids[{i}]": grad for i, grad in enumerate(grad_grids)}
    return {"out": out, "lse": lse, "grad_query": grad_query, "grad_text": grad_text, **named}


def truth(case: Case) -> dict[str, Tensor]:
    """The same by a dense softmax in float64."""
    query, grids, text, length = case.inputs()
    leaves = [tensor.double().requires_grad_() for tensor in (query, text, *grids)]
    q, (k, v) = leaves[0].transpose(1, 2), torch.cat(leaves[1:], 1).permute(2, 0, 3, 1, 4)
    scores = (q @ k.transpose(-1, -2)) * case.size**-0.5
    scores = scores.masked_fill(~mask(case, length)[:, None], -torch.inf)
    probability = scores.softmax(-1) * kept(case)
    out = (probability @ v).transpose(1, 2).flatten(2)
    grads = torch.autograd.grad(out, leaves, case.grad().double())
    names = ("grad_query", "grad_text", *(f"grad_grids[{i}]" for i in range(len(grids))))
    return {"out": out, "lse": scores.logsumexp(-1)} | dict(zip(names, grads, strict=True))


def mask(case: Case, length: Tensor) -> Tensor:
    """bool [B, Q, T + all K]."""
    q = torch.arange(case.rules[0].queries)[:, None]
    image = torch.cat([rule(q, torch.arange(rule.keys)) for rule in case.rules], 1)
    text = text_visible(torch.arange(case.text), length[:, None], case.text)[:, None]
    return torch.cat([text.expand(-1, len(q), -1), image.expand(len(length), -1, -1)], 2)


def kept(case: Case) -> Tensor | float:
    """What probabilities are multiplied by; kernels number queries and keys patch by patch."""
    if not case.dropout:
        return 1.0
    threshold = round(256 * case.dropout)
    columns, start = [], 0
    if case.text:
        numbers, count = patch_numbers(-(-case.text // 8), 8)
        columns.append(numbers[: case.text])
        start += count
    for rule in case.rules:
        numbers, count = patch_numbers(rule.key_rows, rule.key_columns)
        columns.append(start + numbers)
        start += count
    rows, count = patch_numbers(case.rules[0].rows, case.rules[0].columns)
    bits = kept_bits(SEED, np.arange(len(case.lengths) * case.heads), count, start, threshold)
    bits = bits[:, rows][:, :, np.concatenate(columns)]
    shape = (len(case.lengths), case.heads, *bits.shape[1:])
    return torch.from_numpy(bits.reshape(shape)) * (256 / (256 - threshold))


def patch_numbers(rows: int, columns: int) -> tuple[np.ndarray, int]:
    """Number of each cell of a grid, by 4x4 patches in raster order, and how many there are."""
    down, across = -(-rows // 4), -(-columns // 4)
    numbers = np.arange(down * across * 16).reshape(down, across, 4, 4).transpose(0, 2, 1, 3)
    return numbers.reshape(4 * down, 4 * across)[:rows, :columns].ravel(), numbers.size


def check(case: Case, ours: dict[str, Tensor]) -> None:
    for name, value in truth(case).items():
        tolerance = LSE_TOLERANCE if name == "lse" else TOLERANCE[case.dtype]
        largest = float(value.detach().abs().amax()) if value.numel() else 0.0
        torch.testing.assert_close(
            ours[name].double().cpu(),
            value.detach(),
            rtol=tolerance,
            atol=tolerance * max(1.0, largest / 4),  # gradients of text sum over all queries
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_compute_the_softmax_and_its_gradients(case: Case, schedule: Schedule) -> None:
    check(case, run(case, library(schedule)))


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_published_sizes_are_computed_too(case: Case) -> None:
    check(case, run(case, library()))


@pytest.mark.parametrize("case", [CASES[0], CASES[11]], ids=str)
def test_both_schedules_give_the_same_bits(case: Case) -> None:
    first, second = run(case, library("round_robin")), run(case, library("skewed"))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_padded_text_may_hold_anything() -> None:
    case = CASES[2]
    query, grids, text, length = case.inputs()
    text[0, : case.text - case.lengths[0]] = torch.nan
    out, lse = neighbourhood.forward(library(), query, grids, text, length, case.rules, 0.0, SEED)
    *_, grad_text = neighbourhood.backward(
        library(), case.grad(), query, grids, text, length, out, lse, case.rules, 0.0, SEED
    )
    expected = run(case, library())
    assert torch.equal(out, expected["out"])
    assert torch.equal(grad_text, expected["grad_text"])


def test_parts_of_a_packed_product_are_read_in_place() -> None:
    case = Case((same(6, 7, 3, 3),), heads=2)
    query, (kv,), text, length = case.inputs()
    packed = torch.cat([query[:, :, None], kv], 2)
    given = (packed[:, :, 0], [packed[:, :, 1:]], text, length, case.rules, 0.0, SEED)
    out, _ = neighbourhood.forward(library(), *given)
    assert torch.equal(out, run(case, library())["out"])


def test_windows_of_whole_octets_are_read_without_bank_conflicts() -> None:
    kernels = library()
    run(WITHOUT_CONFLICTS, kernels)
    assert kernels.counters.bank_conflicts == 0


def test_warps_multiply_only_what_their_patches_see() -> None:
    kernels = library()
    case = Case((same(16, 16, 5, 5),))
    neighbourhood.forward(kernels, *case.inputs(), case.rules, 0.0, SEED)
    side = [6, 8, 8, 6]  # keys along an axis that each patch of 4 queries sees
    chunks = sum(-(-rows * columns // 16) for rows in side for columns in side)
    products = 2 * (case.size // 16) * 2  # Q K^T and P V, 16 queries by 16 keys
    assert kernels.counters.mma == chunks * products


def test_arguments_outside_the_limits_are_refused() -> None:
    wide = NeighbourhoodRule(1, 193, 1, 193, 1, 1)
    for case in [Case((wide,)), Case((same(2, 2, 1, 1),), size=32)]:
        with pytest.raises(RuntimeError, match="megavideo_neighbourhood_forward returned 1"):
            neighbourhood.forward(library(), *case.inputs(), case.rules, 0.0, SEED)


@pytest.fixture
def emulated_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator runs emulated kernels where a GPU has the real ones."""
    kernels = library()
    monkeypatch.setattr(library_module, "load", lambda: kernels)
    monkeypatch.setattr(operator_module, "_backend", lambda *situation: "library")


@pytest.mark.usefixtures("emulated_operator")
def test_gradients_pass_through_the_operator() -> None:
    case = CASES[2]
    query, (kv,), text, length = case.inputs()
    leaves = [tensor.requires_grad_() for tensor in (query, kv, text)]
    out = neighbourhood_attention(query, [kv], text, length, case.rules)
    results = (out, *torch.autograd.grad(out, leaves, case.grad()))
    expected = truth(case)
    names = ("out", "grad_query", "grad_grids[0]", "grad_text")
    for name, value in zip(names, results, strict=True):
        limit = TOLERANCE[case.dtype]
        torch.testing.assert_close(value.double(), expected[name].detach(), rtol=limit, atol=limit)


@pytest.mark.usefixtures("emulated_operator")
@pytest.mark.parametrize("size", [64, 128])
def test_a_first_look_accepts_these_kernels(size: int) -> None:
    assert operator_module._disagreement(torch.device("cpu"), torch.bfloat16, size) == ""


@pytest.mark.usefixtures("emulated_operator")
def test_a_first_look_refuses_kernels_that_see_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = neighbourhood._grid

    def wider(rule: NeighbourhoodRule, kv: Tensor) -> object:
        return grid(replace(rule, window_columns=rule.window_columns + 2), kv)

    monkeypatch.setattr(neighbourhood, "_grid", wider)
    reason = operator_module._disagreement(torch.device("cpu"), torch.bfloat16, 64)
    assert "differs from the reference" in reason
