"""`megavideo verify-layouts`: right layouts pass, a wrong one is named and ends with status 1."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from megavideo.verify.layout_runs import Trace, compare
from megavideo.verify.layouts_command import main

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FILES = ["configs/model/tiny.yaml", "configs/recipe/demo-stage1.yaml"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*FILES, "--steps", "2", *arguments])


def test_layouts_of_every_kind_train_like_one_process(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    (line,) = re.findall(r"^megavideo verify-layouts (.*)$", PAGE.read_text(), re.MULTILINE)
    result = CliRunner().invoke(main, [*shlex.split(line), "--json", str(rows)])
    assert result.exit_code == 0, result.output
    assert "3 layouts compared with one process, 0 out of tolerance" in result.output
    table = json.loads(rows.read_text())
    assert [row["case"] for row in table[:4]] == ["sgd", "sgd, clipped", "adamw", "adamw, clipped"]
    assert len(table) == 12 and all(0 < row["difference"]["update"] < 1e-4 for row in table)


def test_a_layout_out_of_tolerance_ends_with_status_one() -> None:
    result = run("--layouts", "dp2-zero1", "--update-tolerance", "0")
    assert result.exit_code == 1
    assert "MISS  worst in " in result.output and "1 out of tolerance" in result.output


def test_a_layout_that_cannot_be_is_refused_before_any_is_trained() -> None:
    result = run("--layouts", "dp2-zero1 dp2-zero4")
    assert isinstance(result.exception, ValueError) and "loss" not in result.output


def test_differences_are_relative_to_the_update() -> None:
    golden = Trace([1.0, 2.0], [4.0, 4.0], {"a": torch.tensor([0.0, -2.0]), "b": torch.ones(1)})
    same = compare(golden, golden)
    assert (same.loss, same.norm, same.update) == (0.0, 0.0, 0.0)
    ours = Trace([1.0, 2.5], [4.0, 5.0], {"a": torch.tensor([0.5, -2.0]), "b": torch.ones(1)})
    found = compare(ours, golden)
    assert (found.loss, found.norm, found.update, found.parameter) == (0.5, 0.25, 0.25, "a")
    lost = compare(Trace(golden.losses, golden.norms, {"b": torch.ones(1)}), golden)
    assert lost.update == float("inf") and lost.parameter == "a"


@pytest.mark.parametrize("step", [0, 1])
def test_a_number_that_is_none_is_the_worst_difference_wherever_it_is(step: int) -> None:
    golden = Trace([1.0, 2.0], [4.0, 4.0], {"a": torch.ones(1), "b": torch.ones(1)})
    updates = {"ab"[step]: torch.tensor([math.nan]), "ab"[1 - step]: torch.tensor([2.0])}
    broken = [3.0, 3.0]
    broken[step] = math.nan
    found = compare(Trace(broken, broken, updates), golden)
    assert all(math.isnan(error) for error in (found.loss, found.norm, found.update))
    assert found.parameter == "ab"[step]
