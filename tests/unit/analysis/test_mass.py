"""Attention mass: each query's probabilities, summed by what the key is."""

import pytest
import torch

from megavideo.analysis.command import mass_rows, mixture_rows
from megavideo.analysis.mass import KINDS, MassRecorder
from megavideo.data.batch import Batch
from megavideo.layout.render import dense_mask
from megavideo.layout.rules import temporal_rule
from megavideo.ops.local_attention import local_attention
from tests.unit.generate.models import MODEL, prompts, tiny_model


@pytest.mark.parametrize(("stage", "window"), [("keyframes", 0), ("interpolation", 2)])
def test_mass_is_the_mean_of_the_dense_softmax(stage: str, window: int) -> None:
    rule = temporal_rule(MODEL.grid, stage, window, layer=1)
    torch.manual_seed(0)
    qkv, text = torch.randn(2, 80, 3, 2, 8), torch.randn(2, 6, 2, 2, 8)
    length = torch.tensor([2, 6])
    recorder = MassRecorder(rule, heads=2)
    out = recorder.attend(qkv, text, length)
    assert torch.equal(out, local_attention(qkv, text, length, rule))
    frame = torch.arange(80) // 16
    expected = torch.zeros(2, len(KINDS), dtype=torch.float64)
    for row in range(2):
        keys = torch.cat([text[row, 6 - length[row] :, 0], qkv[row, :, 1]])
        visible = torch.ones(80, len(keys), dtype=torch.bool)
        visible[:, length[row] :] = torch.from_numpy(dense_mask(rule))
        scores = torch.einsum("qhd,khd->hqk", qkv[row, :, 0], keys) / 8**0.5
        probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)[:, frame > 0].double()
        ahead = frame[None] - frame[frame > 0][:, None]
        image = probabilities[..., length[row] :]
        parts = [probabilities[..., : length[row]].sum(-1)]
        parts += [(image * which).sum(-1) for which in (ahead == 0, ahead < 0, ahead > 0)]
        expected += torch.stack(parts, -1).mean(1) / 2
    assert torch.allclose(recorder.mass, expected, atol=1e-6)


def test_rows_cover_layers_and_heads_and_leave_the_model_as_it_was() -> None:
    model = tiny_model("keyframes")
    layers = [block.attention for block in model[1:-1]]
    text = prompts(3, 6)
    batch = Batch(text.text, text.length, torch.randint(30, (3, 5, 16)))
    rows = mass_rows(model, layers, [batch, batch], torch.device("cpu"))
    assert [(row["layer"], row["head"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(sum(row[kind] for kind in KINDS) == pytest.approx(1) for row in rows)
    assert all(layer.temporal.cache is None for layer in layers)


def test_a_mixture_of_one_half_is_said_to_be_one() -> None:
    model = tiny_model("keyframes")
    torch.nn.init.zeros_(model[1].attention.mixture)
    first, second = mixture_rows([block.attention for block in model[1:-1]])
    assert first["mean"] == first["q0.05"] == first["q0.95"] == 0.5
    assert second["q0.05"] < second["q0.50"] < second["q0.95"]
