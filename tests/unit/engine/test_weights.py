"""Models with their weights, before and beside DeepSpeed."""

from pathlib import Path

import pytest
import torch

from megavideo.engine.weights import new_model, start_weights
from megavideo.model import init
from megavideo.model.build import canonical_parameters
from megavideo.model.places import places
from tests.engine.support import config


def test_a_model_is_never_in_a_wider_type_than_its_precision(tmp_path: Path) -> None:
    models = []
    for precision in ("fp32", "bf16"):
        settings = config(tmp_path, {"precision": precision})
        models.append(new_model(settings, torch.device("cpu")))
        start_weights(models[-1], settings)
    full, low = map(canonical_parameters, models)
    for name, parameter in low.items():
        assert parameter.dtype == torch.bfloat16, name
        assert torch.equal(parameter, full[name].bfloat16()), name


def test_nothing_is_drawn_for_what_is_loaded_or_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def noted(place: init.Place, *settings: object) -> torch.Tensor:
        drawn.append(place.name)
        return torch.zeros(place.shape)

    monkeypatch.setattr(init, "_drawn", noted)
    settings = config(tmp_path)
    model = new_model(settings, torch.device("cpu"))
    frozen = [n for n, p in canonical_parameters(model).items() if not p.requires_grad]
    init.initialise(places(model), settings.model, 1, loaded=frozen)
    assert {name.removeprefix("layers.0.attention.") for name in drawn if ".0." in name} == {
        "temporal.dense.weight",
        "temporal.dense.bias",
        "mixture",
    }
    assert all("attention" in name for name in drawn)
