"""Compiled pointwise functions against the eager ones, which define them: in Inductor's own code.

Layouts over several processes are tested with the engine's other layouts (tests/engine).
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from megavideo.config.schema import Recompute
from megavideo.engine.objective import Objective
from megavideo.engine.weights import new_model, start_weights
from megavideo.model.block import Block
from megavideo.model.build import canonical_parameters
from megavideo.model.layers import use_pointwise
from megavideo.model.recompute import SPANS
from megavideo.ops import pointwise
from megavideo.ops.pointwise import EAGER, Pointwise, check_compiler, compiled
from megavideo.verify.made_up import batch_at
from tests.unit.model.test_model import config
from tests.unit.plan.saved_tensors import saved_bytes
from tests.unit.plan.test_activations import TOLERANCE, planned

CPU = torch.device("cpu")
CASE = (
    "tiny", "demo-stage1", "recipe.micro_batch=2", "recipe.hidden_dropout=0.2",
    "recipe.attention_dropout=0.2",
)  # fmt: skip
# Two streams through each residual function; only images are mixed.
GRAPHS = 2 + 2 + 1
# fp32 sums in another order: a few units in the last place.
FP32 = {"rtol": 1e-5, "atol": 1e-6}
# One rounding to bf16 in the end, instead of one after each operation.
BF16 = {"rtol": 2e-2, "atol": 2e-2}


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pointwise]:
    """Compiled once for all tests here, which give them inputs of the same kinds."""
    one_thread = torch._inductor.config.patch(compile_threads=1)
    with pytest.MonkeyPatch.context() as patch, one_thread:
        cache = tmp_path_factory.mktemp("inductor")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        torch._dynamo.reset()
        counters.clear()
        compiled.cache_clear()
        yield compiled()
        compiled.cache_clear()
        torch._dynamo.reset()


def states(slots: int, dtype: torch.dtype, needs_gradient: bool) -> Tensor:
    """Random states of the tiny model, two samples."""
    return torch.randn(2, slots, 32, dtype=dtype).requires_grad_(needs_gradient)


def arguments(name: str, slots: int, dtype: torch.dtype, needs_gradient: bool) -> list[Any]:
    """Of the function of that name, norms frozen as a video model's are."""
    pair = [states(slots, dtype, needs_gradient) for _ in range(2)]
    if name == "mix":
        return [*pair, torch.rand(32, dtype=dtype).requires_grad_()]
    norms = [(torch.randn(32, dtype=dtype), torch.randn(32, dtype=dtype)) for _ in range(2)]
    return [*pair, *norms[: 1 if name == "residual_norm" else 2], 1e-5]


def output_and_gradients(function: Callable[..., Any], given: list[Any]) -> list[Tensor]:
    result = function(*given)
    outputs = list(result) if isinstance(result, tuple) else [result]
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return outputs
    torch.manual_seed(2)
    upstream = [torch.randn_like(output) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize(
    ("name", "slots", "dtype"),
    [
        ("residual_norm", 80, torch.float32),
        ("residual_norms", 80, torch.float32),
        ("residual_norms", 8, torch.float32),
        ("mix", 80, torch.float32),
        ("residual_norms", 80, torch.bfloat16),
    ],
)
def test_a_compiled_function_has_the_eager_ones_output_and_gradients(
    functions: Pointwise, name: str, slots: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    given = arguments(name, slots, dtype, needs_gradient=slots == 80)
    ours = output_and_gradients(getattr(functions, name), given)
    eager = output_and_gradients(getattr(EAGER, name), given)
    tolerance = FP32 if dtype == torch.float32 else BF16
    assert len(ours) == len(eager)
    for one, other in zip(ours, eager, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def train(model: nn.Module, recompute: Recompute, sample: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Frame losses and all gradients of two samples, with dropout from a fixed seed."""
    settings = config(*CASE)
    for layer in model.modules():
        if isinstance(layer, Block):
            layer.spans = SPANS[recompute]
    model.train().zero_grad()
    torch.manual_seed(sample)
    batch = batch_at(settings.model, range(sample, sample + 2), settings.model.frames)
    losses = Objective(settings.model, settings.recipe, CPU)(model, batch)
    losses.mean().backward()
    parameters = canonical_parameters(model).items()
    return losses.detach(), {name: p.grad for name, p in parameters if p.grad is not None}


def test_a_compiled_model_trains_like_an_eager_one_and_compiles_once(functions: Pointwise) -> None:
    model = new_model(config(*CASE), CPU)
    start_weights(model, config(*CASE))
    trainable = {name for name, p in canonical_parameters(model).items() if p.requires_grad}
    policies: tuple[Recompute, ...] = ("none", "layer", "attention", "none", "mlp")
    for number, recompute in enumerate(policies):
        use_pointwise(model, None)
        losses, gradients = train(model, recompute, number)
        use_pointwise(model, functions)
        ours, found = train(model, recompute, number)
        torch.testing.assert_close(ours, losses, **FP32)
        assert found.keys() == trainable
        for name, gradient in gradients.items():
            error = (found[name] - gradient).abs().max() / gradient.abs().max()
            assert error < 1e-5, name
        if number == 0:
            graphs = counters["stats"]["unique_graphs"]
            assert graphs >= GRAPHS
    model.eval()
    settings = config(*CASE)
    with torch.no_grad():  # other kinds of inputs: as they are, whatever their number
        for samples in (1, 3):
            batch = batch_at(settings.model, range(samples), settings.model.frames)
            Objective(settings.model, settings.recipe, CPU)(model, batch)
    assert counters["stats"]["unique_graphs"] == graphs, "something was compiled again"
    assert not counters["graph_break"]


def test_the_plan_knows_what_a_compiled_model_keeps(functions: Pointwise) -> None:
    """The mixture keeps the channels' difference in place of both channels."""
    case = (*CASE, "parallel.compile=true", "parallel.recompute=none")
    counted = saved_bytes(config(*case), "reference", device="cpu")
    assert planned("reference", *case) == pytest.approx(counted, rel=TOLERANCE)


def test_a_machine_that_cannot_compile_says_so_at_once(
    functions: Pointwise, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = pytest.raises(ValueError, match=r"cannot build code for cpu here: .*install a C\+\+ ")
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}), refused:
        check_compiler(CPU)
    monkeypatch.setattr(pointwise, "BACKEND", "aot_eager")
    check_compiler(CPU)


def test_compiled_code_is_not_kept_where_anyone_could_put_some(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # As torch itself sets it, when DeepSpeed is imported.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    monkeypatch.setattr(pointwise, "BACKEND", "eager")
    check_compiler(CPU)
    assert cache_dir() == str(tmp_path / "megavideo" / "inductor")
    (tmp_path / "megavideo").chmod(0o777)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with pytest.raises(ValueError, match="others can write to"):
        check_compiler(CPU)
