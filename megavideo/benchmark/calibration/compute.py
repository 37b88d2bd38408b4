"""Rates of one device: matrix products by shape, attention, pointwise operations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megavideo.benchmark.calibration.clock import Call, seconds_of
from megavideo.layout.grid import Grid
from megavideo.layout.rules import spatial_rule, temporal_rule
from megavideo.layout.tiles import attention_products
from megavideo.model.execution import TILES
from megavideo.ops.backends import choose
from megavideo.ops.local_attention import local_attention
from megavideo.plan.time import BACKWARD_STATES, FORWARD_STATES, LOGIT_BYTES


@dataclass(frozen=True)
class Sizes:
    """What is measured: as large as the models that such a device trains.

    Attributes:
        rows: of matrix products; widths: their columns and depths.
        grid, batch, heads, head_size: of attention.
        elements: of pointwise operations.
        logits: rows and columns of a cross-entropy.
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    grid: Grid
    batch: int
    heads: int
    head_size: int
    elements: tuple[int, int]
    logits: tuple[int, int]


LARGE = Sizes(
    rows=(256, 2048, 8192),
    widths=(768, 3072, 12288),
    grid=Grid(64, 5, 20),
    batch=2,
    heads=48,
    head_size=64,
    elements=(4000, 3072),
    logits=(3200, 20_000),
)
SMALL = Sizes(
    rows=(32, 256, 2560),
    widths=(128, 512),
    grid=Grid(32, 5, 8),
    batch=8,
    heads=4,
    head_size=32,
    elements=(2560, 128),
    logits=(2048, 256),
)


def sizes_of(device: torch.device) -> Sizes:
    """Those of the published model on a GPU, of the demo's on a CPU."""
    return LARGE if device.type == "cuda" else SMALL


def gemm_points(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int
) -> list[tuple[int, int, int, float]]:
    """[rows, columns, depth, TFLOP/s] of linear layers' products, weight gradients included."""
    shapes = [(m, n, k) for m in sizes.rows for n in sizes.widths for k in sizes.widths]
    shapes += [(n, k, max(sizes.rows)) for n in sizes.widths for k in sizes.widths]
    calls = {}
    for m, n, k in dict.fromkeys(shapes):
        x, w = (torch.randn(size, k, device=device).to(dtype) for size in (m, n))
        calls[m, n, k] = partial(F.linear, x, w)
    seconds = seconds_of({str(shape): call for shape, call in calls.items()}, device, rounds)
    return [(m, n, k, 2e-12 * m * n * k / seconds[str((m, n, k))]) for m, n, k in calls]


def attention_rates(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[str, dict[str, float]]:
    """The backend of whole causal attention, and TFLOP/s of executed products, without dropout."""
    grid, heads, size = sizes.grid, sizes.heads, sizes.head_size
    rules = [spatial_rule(grid, "keyframes"), temporal_rule(grid, "keyframes", 0, 0)]
    shape = (sizes.batch, grid.image_tokens, 3, heads, size)
    packed = torch.randn(shape, device=device).to(dtype).requires_grad_()
    text_shape = (sizes.batch, grid.text, 2, heads, size)
    text = torch.randn(text_shape, device=device).to(dtype).requires_grad_()
    length = torch.full((sizes.batch,), grid.text, device=device)
    backends = [choose(device.type, dtype, size, False, rule.family) for rule in rules]
    done = [
        attention_products(rule, grid.text, TILES[backend], size, True)
        for rule, backend in zip(rules, backends, strict=True)
    ]
    scale = 2e-12 * size * heads * sizes.batch
    calls: dict[str, Call] = {}
    for number, rule in enumerate(rules):
        forward = partial(local_attention, packed, text, length, rule)
        calls[f"forward {number}"] = forward
        calls[f"backward {number}"] = _backward(forward(), [packed, text])
    seconds = seconds_of(calls, device, rounds)

    def rate(direction: str, products: list[int]) -> float:
        total = sum(seconds[f"{direction} {number}"] for number in range(len(rules)))
        return scale * sum(products) / total

    return backends[-1], {
        "forward": rate("forward", [p.forward for p in done]),
        "backward": rate("backward", [p.backward for p in done]),
    }


def pointwise_rates(
    sizes: Sizes, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, float]:
    """GB/s of each operation, in bytes as plan/time.py counts them."""
    rows, width = sizes.elements
    x, y = (torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(2))
    wide = torch.randn(rows, 4 * width, device=device).to(dtype).requires_grad_()
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    mixture = torch.zeros(width, device=device, dtype=dtype, requires_grad=True)
    noise = torch.randn(rows, width, device=device).to(dtype)
    forwards: dict[str, tuple[Callable[[], Tensor], list[Tensor], float]] = {
        "layer_norm": (lambda: F.layer_norm(x, (width,), weight, bias), [x], 4),
        "gelu": (lambda: F.gelu(wide, approximate="tanh"), [wide], 1),
        "mix": (lambda: torch.lerp(x, y, mixture.sigmoid()), [x, y, mixture], 1),
        "dropout": (lambda: F.dropout(x, 0.1), [x], 1),
    }
    states = rows * width * x.element_size()
    calls: dict[str, Call] = {"copy": lambda: noise + noise}
    moved: dict[str, float] = {"copy": 3 * states}
    for name, (forward, inputs, times) in forwards.items():
        calls[name], calls[f"{name}_backward"] = forward, _backward(forward(), inputs)
        moved[name] = FORWARD_STATES[name] / times * states
        moved[f"{name}_backward"] = BACKWARD_STATES[name] / times * states
    _add_loss(sizes, dtype, device, calls, moved)
    _add_adam(sizes, device, calls, moved)
    seconds = seconds_of(calls, device, rounds)
    return {name: moved[name] / seconds[name] / 1e9 for name in calls}


def _add_loss(
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    calls: dict[str, Call],
    moved: dict[str, float],
) -> None:
    rows, columns = sizes.logits
    logits = torch.randn(rows, columns, device=device).to(dtype).requires_grad_()
    labels = torch.randint(columns, (rows,), device=device)

    def loss() -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    calls["softmax"], calls["softmax_backward"] = loss, _backward(loss(), [logits])
    moved["softmax"] = LOGIT_BYTES["forward"] * rows * columns
    moved["softmax_backward"] = LOGIT_BYTES["backward"] * rows * columns


def _add_adam(
    sizes: Sizes, device: torch.device, calls: dict[str, Call], moved: dict[str, float]
) -> None:
    """torch's fused AdamW: it reads and writes weight and moments and reads the gradient."""
    rows, width = sizes.elements
    weight = torch.zeros(rows * width, device=device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    calls["adam"] = torch.optim.AdamW([weight], fused=True).step
    moved["adam"] = 28 * rows * width


def _backward(out: Tensor, inputs: list[Tensor]) -> Call:
    grad = torch.randn_like(out)
    return partial(torch.autograd.grad, out, inputs, grad, retain_graph=True)
