"""The published step: same loss and gradients as ours, and exactly the published code's FLOPs."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megavideo.benchmark.published import check_published, published
from megavideo.config.load import load_config
from megavideo.config.schema import Config, Recompute
from megavideo.engine.objective import Objective
from megavideo.engine.weights import new_model, start_weights
from megavideo.model.build import canonical_parameters
from megavideo.model.published_flops import published_work
from megavideo.verify.made_up import batch_at

CPU = torch.device("cpu")
SETTINGS = (
    "recipe.steps=1", "recipe.precision=fp32", "recipe.hidden_dropout=0",
    "recipe.attention_dropout=0", "data.train=none",
    "data.text_tokenizer=none", "run.directory=none",
)  # fmt: skip


def config(*settings: str) -> Config:
    return load_config(["configs/model/tiny.yaml"], [*SETTINGS, *settings])


def gradients(settings: Config, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    parameters = canonical_parameters(model)
    model.zero_grad()
    losses = Objective(settings.model, settings.recipe, CPU)(
        model, batch_at(settings.model, range(2), settings.model.frames)
    )
    losses.mean().backward()
    found = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert set(found) == {name for name, p in parameters.items() if p.requires_grad}
    return losses.detach(), found


@pytest.mark.parametrize(
    ("stage", "window", "recompute"),
    [
        ("keyframes", 0, "layer"),
        ("keyframes", 2, "attention"),
        ("interpolation", 2, "mlp"),
    ],
)
def test_it_trains_the_same_by_the_published_amount_of_work(
    stage: str, window: int, recompute: Recompute
) -> None:
    settings = config(
        f"recipe.stage={stage}", f"recipe.window={window}", f"parallel.recompute={recompute}"
    )
    model = new_model(settings, CPU)
    start_weights(model, settings)
    for parameter in canonical_parameters(model).values():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    losses, ours = gradients(settings, model)
    with published(model), FlopCounterMode(display=False) as counter:
        theirs_losses, theirs = gradients(settings, model)
    work = published_work(settings.model, settings.recipe, recompute)
    executed = sum(part.total + part.again for part in work)
    assert counter.get_total_flops() == 2 * executed  # two samples
    torch.testing.assert_close(theirs_losses, losses, rtol=1e-5, atol=0)
    for name, gradient in ours.items():
        error = (theirs[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, name
    again, _ = gradients(settings, model)
    torch.testing.assert_close(again, losses, rtol=0, atol=0)  # ours again


@pytest.mark.parametrize("setting", ["parallel.pp=2", "parallel.tp=2", "parallel.zero=3"])
def test_it_refuses_cut_layers(setting: str) -> None:
    with pytest.raises(ValueError, match="runs whole layers"):
        check_published(config("recipe.stage=keyframes", setting))
