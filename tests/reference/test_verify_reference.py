"""`megavideo verify-reference` passes on the published arrays and fails on a wrong model."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from megavideo.checkpoint.formats.sat import SAFE_TYPES
from megavideo.generate import decode
from megavideo.layout.neighbourhood import NeighbourhoodRule
from megavideo.layout.rules import temporal_rule
from megavideo.model import attention, build, layers
from megavideo.superres import layers as superres_layers
from megavideo.superres.layers import Embedding
from megavideo.verify.command import main
from megavideo.verify.compare import compare
from tests.unit.checkpoint.samples import sat_part

VECTORS = Path(__file__).parent / "vectors"


def verify(directory: Path) -> Result:
    return CliRunner().invoke(main, [str(directory)], catch_exceptions=False)


def test_every_published_array_is_reproduced() -> None:
    result = verify(VECTORS)
    assert result.exit_code == 0, result.output
    assert ", 0 out of tolerance" in result.output
    assert "no check for" not in result.output
    for case in (
        "pub1",
        "pub3",
        "pub4",
        "pubG1",
        "pubG2",
        "pubG3",
        "pub_lr",
        "pub_ckpt_base",
        "pub_sampling",
        "pub_dsr",
        "pub_itersr",
        "pub_ila",
    ):
        assert case in result.output


@pytest.fixture
def window_case(tmp_path: Path) -> Path:
    for path in VECTORS.glob("pub3_*"):
        shutil.copy(path, tmp_path)
    return tmp_path


def wrong_mixture(monkeypatch: pytest.MonkeyPatch) -> None:
    lerp = torch.lerp
    monkeypatch.setattr(attention.torch, "lerp", lambda a, b, w: lerp(b, a, w))


def wrong_shift(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        build, "temporal_rule", lambda g, stage, w, layer: temporal_rule(g, stage, w, layer + 1)
    )


def wrong_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(layers.F, "gelu", lambda x, approximate: gelu(x))


def wrong_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = torch.nn.functional.layer_norm
    monkeypatch.setattr(layers.F, "layer_norm", lambda *a: norm(*a[:4], eps=1e-6))


@pytest.mark.parametrize("mistake", [wrong_mixture, wrong_shift, wrong_gelu, wrong_norm])
def test_a_wrong_model_is_found_out(
    mistake: Callable[[pytest.MonkeyPatch], None],
    window_case: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert verify(window_case).exit_code == 0
    mistake(monkeypatch)
    result = verify(window_case)
    assert result.exit_code == 1
    assert "MISS" in result.output


@pytest.mark.parametrize("departure", ["first_pass_rule", "step_rule"])
def test_decoding_as_trained_is_not_the_published_decoding(
    departure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The case has windows of twice the shift, for which published steps see what training does."""
    for path in VECTORS.glob("pubG2_*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(decode, departure, lambda rule: rule)
    assert verify(tmp_path).exit_code == (1 if departure == "first_pass_rule" else 0)


def wrong_window(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = superres_layers.fine_rule
    monkeypatch.setattr(superres_layers, "fine_rule", lambda c: replace(rule(c), window_rows=5))


def wrong_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A neighbour's cell instead of one's own."""
    call = NeighbourhoodRule.__call__
    monkeypatch.setattr(NeighbourhoodRule, "__call__", lambda rule, q, k: call(rule, q, k + 1))


def wrong_position(monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = Embedding.coarse
    monkeypatch.setattr(Embedding, "coarse", lambda self, ids, at: coarse(self, ids, at - 1))


@pytest.mark.parametrize(
    ("mistake", "cases"),
    [
        (wrong_window, {"pub_dsr", "pub_itersr"}),
        (wrong_queries, {"pub_dsr", "pub_itersr", "pub_ila"}),
        (wrong_position, {"pub_dsr"}),
    ],
)
def test_wrong_super_resolution_is_found_out(
    mistake: Callable[[pytest.MonkeyPatch], None],
    cases: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("pub_dsr", "pub_itersr", "pub_ila"):
        shutil.copy(VECTORS / f"{name}.npz", tmp_path)
    mistake(monkeypatch)
    lines = verify(tmp_path).output.splitlines()
    assert {line.split()[0] for line in lines if line.endswith("MISS")} == cases


def test_what_has_no_check_is_listed(window_case: Path) -> None:
    np.savez(window_case / "strange.npz", x=np.zeros(3))
    result = verify(window_case)
    assert result.exit_code == 0
    assert "no check for strange.npz" in result.output


def test_a_folder_without_vectors_is_no_success(tmp_path: Path) -> None:
    assert verify(tmp_path).exit_code == 1


def test_nan_and_wrong_shapes_are_misses() -> None:
    one = np.ones(3)
    assert compare("case", "x", one, one, "float64").ok
    assert not compare("case", "x", one * np.nan, one, "float64").ok
    assert not compare("case", "x", one[:2], one, "float64").ok


def test_a_checkpoint_split_over_two_ranks_is_the_same_base(tmp_path: Path) -> None:
    shutil.copytree(VECTORS / "pub_ckpt_base", tmp_path / "split")
    (whole,) = (tmp_path / "split").rglob("mp_rank_00_model_states.pt")
    with torch.serialization.safe_globals(SAFE_TYPES):
        content = torch.load(whole, weights_only=True)
    for rank in range(2):
        module = {n: sat_part(n, t, rank, 2) for n, t in content["module"].items()}
        path = whole.with_name(f"mp_rank_{rank:02d}_model_states.pt")
        torch.save({**content, "module": module}, path)
    result = verify(tmp_path)
    assert result.exit_code == 0, result.output
    assert "split" in result.output
