"""Activation bytes as planned, against a count of every tensor that autograd keeps."""

import pytest

from megavideo.plan.activations import Ledger
from tests.unit.model.test_model import config
from tests.unit.plan.saved_tensors import saved_bytes

FULL = ("model.layers=2", "recipe.micro_batch=2")
TOLERANCE = 0.003  # flags, seeds and lengths: bytes where states are megabytes


def planned(attention: str, model: str, recipe: str, *settings: str) -> int:
    settled = config(model, recipe, *settings)
    layers = Ledger(settled, attention, on_gpu=False).layers()
    return sum(layer.kept for layer in layers) * settled.recipe.micro_batch


@pytest.mark.parametrize(
    ("recipe", "attention", "settings"),
    [
        ("stage1", "library", ("parallel.recompute=none",)),
        ("stage2", "reference", ("parallel.recompute=none", "recipe.hidden_dropout=0.0")),
        ("stage1", "library", ("parallel.recompute=none", "parallel.tp=2")),
        (
            "stage2",
            "library",
            ("parallel.recompute=none", "parallel.tp=8", "parallel.sequence_parallel=true"),
        ),
        ("stage1", "library", ("parallel.recompute=layer",)),
        ("stage1", "library", ("parallel.recompute=mlp",)),
        ("stage2", "library", ("parallel.recompute=attention", "recipe.hidden_dropout=0.0")),
        ("stage1", "library", ("parallel.recompute=mlp", "parallel.tp=2")),
        ("stage1", "library", ("parallel.recompute=attention", "parallel.tp=2")),
        (
            "stage2",
            "library",
            ("parallel.recompute=mlp", "parallel.tp=8", "parallel.sequence_parallel=true"),
        ),
        (
            "stage1",
            "library",
            ("parallel.recompute=attention", "parallel.tp=4", "parallel.sequence_parallel=true"),
        ),
        (
            "stage1",
            "library",
            ("parallel.recompute=layer", "parallel.tp=4", "parallel.sequence_parallel=true"),
        ),
    ],
)
def test_activations_of_the_published_sizes_are_those_that_autograd_keeps(
    recipe: str, attention: str, settings: tuple[str, ...]
) -> None:
    case = ("cogvideo-9b", recipe, *FULL, *settings)
    counted = saved_bytes(config(*case), attention)
    assert planned(attention, *case) == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("recipe", ["demo-base", "demo-stage1", "demo-stage2"])
@pytest.mark.parametrize(
    ("attention", "recompute"),
    [("sdpa", "none"), ("reference", "none"), ("sdpa", "mlp"), ("reference", "attention")],
)
def test_activations_of_the_demo_on_a_cpu_are_those_that_autograd_keeps(
    recipe: str, attention: str, recompute: str
) -> None:
    """On a CPU, because torch's fused attention of text does not exist on the meta device."""
    case = ("demo", recipe, f"parallel.recompute={recompute}", "recipe.micro_batch=2")
    counted = saved_bytes(config(*case), attention, device="cpu")
    assert planned(attention, *case) == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("cut", [(), ("parallel.tp=2", "parallel.sequence_parallel=true")])
def test_what_is_computed_again_is_what_recomputation_did_not_keep(cut: tuple[str, ...]) -> None:
    """In one layer at a time: its own part, less the image states that are there already."""
    case = ("cogvideo-9b", "stage1", *FULL, *cut)
    all_kept = saved_bytes(config(*case, "parallel.recompute=none"), "library")
    for recompute in ("mlp", "attention", "layer"):
        settled = config(*case, f"parallel.recompute={recompute}")
        ledger = Ledger(settled, "library", on_gpu=False)
        layers, samples = settled.model.layers, settled.recipe.micro_batch
        dropped = (all_kept - saved_bytes(settled, "library")) / layers / samples
        frozen_text = settled.model.text_slots * settled.model.hidden * 2 // settled.parallel.tp
        assert ledger.block(0).working == pytest.approx(dropped + frozen_text, rel=TOLERANCE)
