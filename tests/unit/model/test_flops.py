"""FLOPs against torch's own counter in a real step, and against counts of the published code."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavideo.config.schema import Config, Recompute
from megavideo.engine.objective import Objective
from megavideo.layout.grid import Grid
from megavideo.layout.rules import Rule, spatial_rule, temporal_rule
from megavideo.layout.tiles import attention_products
from megavideo.model.build import build_model, canonical_parameters, stage_grid
from megavideo.model.flops import (
    Execution,
    executed_flops,
    naive_flops,
    sample_work,
    training_flops,
)
from megavideo.model.init import initialise
from megavideo.model.places import places
from megavideo.model.published_flops import published_work
from megavideo.model.recompute import SPANS
from megavideo.model.trainable import mark_trainable
from megavideo.verify.made_up import batch_at
from tests.unit.model.test_model import config

# Counted by the published code itself at full size, on tensors without memory:
# forward, and backward with a frozen base, of one sample.
PUBLISHED = {
    ("stage1", 0): (34_747_635_400_704, 45_153_904_951_296),
    ("stage1", 10): (32_978_163_400_704, 41_614_960_951_296),
    ("stage2", 10): (32_978_163_400_704, 41_614_960_951_296),
}
SMALL = ("recipe.precision=fp32", "recipe.hidden_dropout=0.0", "recipe.attention_dropout=0.0")


@pytest.mark.parametrize(("recipe", "window"), PUBLISHED)
def test_the_published_codes_flops_are_exact(recipe: str, window: int) -> None:
    full = config("cogvideo-9b", recipe, f"recipe.window={window}")
    work = published_work(full.model, full.recipe)
    forward = sum(part.forward for part in work)
    backward = sum(part.input_gradient + part.weight_gradient for part in work)
    assert (forward, backward) == PUBLISHED[recipe, window]


def counted_by_torch(settings: Config, recompute: Recompute) -> int:
    """FLOPs of one sample's forward and backward that pass torch's dispatcher."""
    model = build_model(settings.model, settings.recipe, recompute)
    parameters = canonical_parameters(model)
    initialise(places(model), settings.model, seed=1)
    mark_trainable(parameters, settings.recipe.stage)
    frames = stage_grid(settings.model, settings.recipe.stage).frames
    objective = Objective(settings.model, settings.recipe, torch.device("cpu"))
    counter = FlopCounterMode(display=False)
    # The counter knows no fused attention of a CPU; as plain products it is counted like any other.
    with counter, sdpa_kernel(SDPBackend.MATH):
        objective(model, batch_at(settings.model, range(1), frames)).mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("recompute", SPANS)
@pytest.mark.parametrize("recipe", ["demo-base", "demo-stage1", "demo-stage2"])
def test_executed_flops_are_what_torch_counts(recipe: str, recompute: Recompute) -> None:
    """Plain products keep the scores, of which fused attention computes one product again."""
    settings = config("demo", recipe, *SMALL)
    execution = Execution("blocks", recompute)
    work = sample_work(settings.model, settings.recipe, execution)
    scores_again = sum(part.forward // 2 for part in work if part.part in IMAGE_ATTENTION)
    expected = executed_flops(settings.model, settings.recipe, execution) - scores_again
    assert counted_by_torch(settings, recompute) == expected


IMAGE_ATTENTION = ("spatial attention", "temporal attention")


def test_useful_flops_differ_from_torchs_count_by_hidden_pairs_only() -> None:
    settings = config("demo", "demo-stage1", *SMALL)
    useful = {part.part: part for part in sample_work(settings.model, settings.recipe)}
    blocks = {
        part.part: part
        for part in sample_work(settings.model, settings.recipe, Execution("blocks", "none"))
    }
    assert all(useful[part] == blocks[part] for part in useful if part not in IMAGE_ATTENTION)
    assert all(useful[part].forward < blocks[part].forward for part in IMAGE_ATTENTION)


def test_charging_frozen_weights_as_trained_counts_a_third_too_much() -> None:
    full = config("cogvideo-9b", "stage1")
    ratio = naive_flops(full.model, full.recipe) / training_flops(full.model, full.recipe)
    assert naive_flops(full.model, full.recipe) == 6 * 7_721_127_936 * 2064
    assert ratio == pytest.approx(1.343, abs=1e-3)


@pytest.mark.parametrize(
    ("rule", "forward", "backward", "atomic"),
    [
        (spatial_rule(Grid(64, 5, 20), "keyframes"), 1.36, 1.34, 1.33),
        (spatial_rule(Grid(64, 5, 20), "interpolation"), 1.27, 1.22, 1.18),
        (temporal_rule(Grid(64, 5, 20), "keyframes", 0, 0), 1.08, 1.08, 1.08),
        (temporal_rule(Grid(64, 5, 20), "interpolation", 10, 0), 1.09, 1.08, 1.07),
        (temporal_rule(Grid(64, 5, 20), "interpolation", 10, 1), 1.17, 1.13, 1.11),
    ],
)
def test_the_kernels_products_are_those_that_the_emulator_counted(
    rule: Rule, forward: float, backward: float, atomic: float
) -> None:
    """Two, seven and five products over the pairs seen: kernels/local_attention/README.md."""
    needed = attention_products(rule, 64, "visible", 64, True).forward / 2
    done = attention_products(rule, 64, "library", 64, True)
    assert done.forward / (2 * needed) == pytest.approx(forward, abs=5e-3)
    assert done.backward / (7 * needed) == pytest.approx(backward, abs=5e-3)
    one_pass = attention_products(rule, 64, "atomic", 64, True)
    assert one_pass.backward / (5 * needed) == pytest.approx(atomic, abs=5e-3)
