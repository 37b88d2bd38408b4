"""`megavideo benchmark generate`: same tokens, rows, a ratio; a broken cache is found out."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from megavideo.benchmark import generation
from megavideo.benchmark.generation import Case, Problem, main
from megavideo.generate.cache import ChannelCache
from tests.unit.generate.models import MODEL

SMALL = "--hidden 16 --heads 2 --layers 2 --side 2 --window 2 --text 3 --codes 20 --rounds 2"


def test_rows_say_how_much_faster_the_cache_is(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--batch", "2", *SMALL.split()]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "generation.json").read_text())["rows"]
    assert [(row["stage"], row["contender"]) for row in rows] == [
        (stage, name)
        for stage in ("keyframes", "interpolation")
        for name in ("cached", "recomputing")
    ]
    for row in rows:
        assert row["same_tokens"] and row["tokens_per_s"] > 0
        assert (row["times_recomputing"] == 1) == (row["contender"] == "recomputing")
        assert f"| {row['tokens_per_s']} |" in result.output


@pytest.mark.parametrize(("stage", "window"), [("keyframes", 0), ("interpolation", 2)])
def test_recomputing_every_token_takes_the_same_tokens(
    stage: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "RECOMPUTED", 16)
    case = Case(stage, window, 2, MODEL, torch.float32)
    assert Problem(case, torch.device("cpu")).agree()
    step = ChannelCache._step

    def forgetful(self, q, k, v):  # type: ignore[no-untyped-def]
        self.values.neg_()
        return step(self, q, k, v)

    monkeypatch.setattr(ChannelCache, "_step", forgetful)
    with pytest.raises(ValueError, match="tokens differ"):
        list(generation.measure(case, torch.device("cpu"), rounds=2))
