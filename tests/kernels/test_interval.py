"""The CUDA source of interval attention, emulated, against a dense softmax in float64."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from megavideo.layout.intervals import TILE, intervals
from megavideo.layout.rules import Rule
from megavideo.layout.tiles import attention_products
from megavideo.ops import interval
from tests.kernels.attention_truth import true_attention
from tests.kernels.emulated import KERNELS, SCHEDULES, Emulator, Schedule, build
from tests.kernels.watched import WatchedLibrary

SOURCES = [
    KERNELS / "library.cu",
    KERNELS / "local_attention" / "interval_forward.cu",
    KERNELS / "local_attention" / "interval_backward.cu",
]

# One rounding of inputs' products (P, dS) and one of the result, relative to sums of order 1 to 4.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}
LSE_TOLERANCE = 1e-5  # float32 all the way


@lru_cache
def emulator() -> Emulator:
    return Emulator(build(SOURCES))


def library(schedule: Schedule = "skewed") -> WatchedLibrary:
    return WatchedLibrary(emulator(), schedule)


@dataclass(frozen=True)
class Case:
    rule: Rule
    text: int = 9
    lengths: tuple[int, ...] = (1, 9)
    heads: int = 1
    size: int = 64
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.0

    def __str__(self) -> str:
        rule = self.rule
        kind = "frame" if rule.own_frame else f"w{rule.window}-shift{rule.shift}"
        way = "-two_way" * rule.two_way + f"-drop{self.dropout}" * bool(self.dropout)
        batch = f"B{len(self.lengths)}-T{self.text}-H{self.heads}-D{self.size}"
        dtype = str(self.dtype).split(".")[1]
        return f"{batch}-F{rule.frames}-{rule.side}x{rule.side}-{kind}{way}-{dtype}"

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        batch, slots = len(self.lengths), self.rule.frames * self.rule.side**2
        image = draw(batch, slots, 3, self.heads, self.size)
        text = draw(batch, self.text, 2, self.heads, self.size)
        return image, text, torch.tensor(self.lengths)

    def grad(self) -> Tensor:
        slots = self.rule.frames * self.rule.side**2
        shape = (len(self.lengths), slots, self.heads * self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(self.dtype)


FRAMES = Rule(3, 7, own_frame=True)
WINDOWS = Rule(3, 9, window=6, shift=3)
CASES = [
    Case(FRAMES),
    Case(Rule(3, 9, own_frame=True, two_way=True), lengths=(4,), heads=2),
    Case(Rule(2, 9), text=70, lengths=(3, 70)),  # two text tiles, of which one is skipped
    Case(Rule(5, 6, two_way=True), text=64, lengths=(64, 33)),
    Case(WINDOWS),
    Case(Rule(5, 8, window=4, shift=2, two_way=True), lengths=(2,), heads=2),
    Case(Rule(1, 1), text=1, lengths=(1,)),
    Case(Rule(1, 17), text=5, lengths=(5,), dtype=torch.float16),
    Case(Rule(3, 9, own_frame=True, two_way=True), size=128, lengths=(4,)),
    Case(Rule(2, 9), text=70, lengths=(70,), size=128, dtype=torch.float16),
    Case(Rule(13, 3, two_way=True), lengths=(9,)),  # 63 given slots: a tile but for one place
    Case(WINDOWS, dropout=0.1),
    Case(Rule(2, 9, two_way=True), text=70, lengths=(3, 70), heads=2, dropout=0.5),
    Case(FRAMES, size=128, dropout=0.1, dtype=torch.float16),
]


SEED = 0x1234_5678_9ABC_DEF0
# Backward in two passes, and in one that adds gradients of queries atomically.
WAYS = pytest.mark.parametrize("atomic", [False, True], ids=["two_passes", "atomic"])


def run(case: Case, kernels: Any, device: str = "cpu", atomic: bool = False) -> dict[str, Tensor]:
    """Output, lse and gradients."""
    given = [tensor.to(device) for tensor in case.inputs()]
    noise = (case.rule, case.dropout, SEED)
    out, lse = interval.forward(kernels, *given, *noise)
    grad = case.grad().to(device)
    image, text = interval.backward(kernels, grad, *given, out, lse, *noise, atomic=atomic)
    assert text is not None
    return {"out": out, "lse": lse, "grad_image": image, "grad_text": text}


def truth(case: Case) -> dict[str, Tensor]:
    image, text, length = case.inputs()
    image, text = image.double().requires_grad_(), text.double().requires_grad_()
    out, lse = true_attention(image, text, length, case.rule, case.dropout, SEED)
    grads = torch.autograd.grad(out, (image, text), case.grad().double())
    return {"out": out, "lse": lse, "grad_image": grads[0], "grad_text": grads[1]}


def check(case: Case, ours: dict[str, Tensor]) -> None:
    for name, value in truth(case).items():
        tolerance = LSE_TOLERANCE if name == "lse" else TOLERANCE[case.dtype]
        torch.testing.assert_close(
            ours[name].double().cpu(),
            value.detach(),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@WAYS
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_compute_the_softmax_and_its_gradients(
    case: Case, schedule: Schedule, atomic: bool
) -> None:
    check(case, run(case, library(schedule), atomic=atomic))


@pytest.mark.parametrize("case", [CASES[4], CASES[12]], ids=str)
def test_both_schedules_give_the_same_bits(case: Case) -> None:
    first, second = run(case, library("round_robin")), run(case, library("skewed"))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_only_gradients_of_queries_depend_on_the_order_of_atomic_additions() -> None:
    case = CASES[7]
    first, second = (run(case, library(schedule), atomic=True) for schedule in SCHEDULES)
    image = [result.pop("grad_image") for result in (first, second)]
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.equal(image[0][:, :, 1:], image[1][:, :, 1:])
    assert not torch.equal(image[0][:, :, 0], image[1][:, :, 0])


def test_text_in_a_bigger_tensor_is_read_in_place() -> None:
    case = Case(FRAMES, heads=2)
    image, text, length = case.inputs()
    wide = torch.cat([torch.full_like(text[:, :, :1], torch.nan), text], 2)
    assert not wide[:, :, 1:].is_contiguous()
    strided = interval.forward(library(), image, wide[:, :, 1:], length, case.rule, 0.0, 0)
    assert torch.equal(strided[0], run(case, library())["out"])


@WAYS
def test_padded_text_is_never_read(atomic: bool) -> None:
    case = Case(FRAMES)
    image, text, length = case.inputs()
    clean = run(case, library(), atomic=atomic)
    text[0, :-1] = torch.nan
    out, lse = interval.forward(library(), image, text, length, case.rule, 0.0, SEED)
    given = (image, text, length, out, lse, case.rule, 0.0, SEED)
    grads = interval.backward(library(), case.grad(), *given, atomic=atomic)
    for ours, expected in zip((out, lse, *grads), clean.values(), strict=True):
        assert torch.equal(ours, expected)


def test_rows_that_are_not_aligned_are_copied_first() -> None:
    case = Case(FRAMES)
    image, text, length = case.inputs()
    odd = torch.empty(image.numel() + 1, dtype=image.dtype)[1:].view_as(image).copy_(image)
    assert odd.data_ptr() % 16
    out, _ = interval.forward(library(), odd, text, length, case.rule, 0.0, 0)
    assert torch.equal(out, run(case, library())["out"])


@WAYS
def test_frozen_text_costs_no_gradient(atomic: bool) -> None:
    case = CASES[2]
    given = case.inputs()
    out, lse = interval.forward(library(), *given, case.rule, 0.0, SEED)
    frozen, trained = library(), library()
    arguments = (case.grad(), *given, out, lse, case.rule, 0.0, SEED)
    image, text = interval.backward(frozen, *arguments, text_needs_grad=False, atomic=atomic)
    assert text is None
    assert torch.equal(image, interval.backward(trained, *arguments, atomic=atomic)[0])
    assert frozen.counters.mma < trained.counters.mma


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shared_memory_is_read_without_bank_conflicts(case: Case) -> None:
    kernels = library()
    given = case.inputs()
    out, lse = interval.forward(kernels, *given, case.rule, case.dropout, SEED)
    assert kernels.counters.bank_conflicts == 0
    for atomic in (False, True):
        arguments = (*given, out, lse, case.rule, case.dropout, SEED)
        interval.backward(kernels, case.grad(), *arguments, atomic=atomic)
        assert kernels.counters.bank_conflicts == 0


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[5]], ids=str)
def test_warps_multiply_only_tiles_that_their_queries_see(case: Case) -> None:
    kernels = library()
    interval.forward(kernels, *case.inputs(), case.rule, 0.0, 0)
    layout = intervals(case.rule)
    rows = 32
    begin = layout.begin.reshape(-1, rows).min(1) // TILE
    end = -(-layout.end.reshape(-1, rows).max(1) // TILE)
    tiles = int((end - begin).sum()) + len(begin)  # and one tile of text
    products = tiles * (rows // 16) * 2 * (TILE // 8) * (case.size // 16)
    # The last block has 128 queries; where the layout ends at its middle, two warps do text only.
    spare = len(layout.slots) // TILE % 2 * 2 * (rows // 16) * 2 * (TILE // 8) * (case.size // 16)
    blocks = len(case.lengths) * case.heads
    assert kernels.counters.mma == blocks * (products + spare)


@WAYS
@pytest.mark.parametrize("text_needs_grad", [True, False], ids=["trained_text", "frozen_text"])
def test_backward_does_the_products_that_plans_count(text_needs_grad: bool, atomic: bool) -> None:
    case = Case(Rule(5, 6, two_way=True), text=64, lengths=(64,))
    given, kernels = case.inputs(), library()
    out, lse = interval.forward(kernels, *given, case.rule, 0.0, 0)
    arguments = (case.grad(), *given, out, lse, case.rule, 0.0, 0, text_needs_grad, atomic)
    interval.backward(kernels, *arguments)
    how = "atomic" if atomic else "library"
    expected = attention_products(case.rule, case.text, how, case.size, text_needs_grad)
    assert kernels.counters.mma * 16 * 8 * 16 == expected.backward * case.size


def test_atomic_additions_move_a_tile_of_float32_for_each_pair_of_tiles() -> None:
    case = Case(Rule(2, 9), text=70, lengths=(70,))
    kernels = library()
    run(case, kernels, atomic=True)
    tiles = -(-2 * 81 // TILE)
    pairs = tiles * (tiles + 1) // 2 + tiles * -(-case.text // TILE)
    assert kernels.counters.added == pairs * TILE * case.size * 4


def test_arguments_outside_the_limits_are_refused() -> None:
    case = Case(FRAMES)
    image, text, length = case.inputs()
    with pytest.raises(RuntimeError, match="megavideo_interval_forward returned 1"):
        interval.forward(library(), image[..., :32], text[..., :32], length, case.rule, 0.0, 0)
    for dropout in (0.001, 1.0):
        with pytest.raises(ValueError, match=f"attention dropout {dropout} rounds to"):
            interval.forward(library(), image, text, length, case.rule, dropout, 0)
