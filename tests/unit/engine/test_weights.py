"""Models with their weights, before and beside DeepSpeed."""

from pathlib import Path

import torch

from megavideo.engine.weights import new_model, start_weights
from megavideo.model.build import canonical_parameters
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
