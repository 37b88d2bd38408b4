"""The commands of docs/benchmarks.md run, on a tiny model and data set of those names."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ruamel.yaml import YAML

from megavideo.benchmark import worlds
from megavideo.benchmark.step import Window
from megavideo.cli import group
from megavideo.config.schema import ParallelConfig
from tests.engine.dataset import make_dataset
from tests.engine.test_step_benchmark import FEW, keep_the_world  # noqa: F401  # a fixture

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
SMALL = {
    "step": FEW,
    "layouts": FEW,
    "loader": ["--samples", "32"],
    "checkpoint": ["--rounds", "1"],
}


def in_this_process(
    function: Any, size: int, case: worlds.Case, window: Window, folder: Path, deadline_s: float
) -> None:
    """In place of `run_world`: every layout is one process; other tests start worlds."""
    alone = case.config.model_copy(update={"parallel": ParallelConfig()})
    function(0, worlds.Case(case.name, alone, 1), window, folder)


def write_small_files(folder: Path) -> None:
    """The configurations that the page names, with a model and data that are tiny."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    yaml = YAML(typ="safe", pure=True)
    tiny = yaml.load(make_dataset(folder))
    for section in ("model", "data"):
        yaml.dump({section: tiny[section]}, folder / "configs" / section / "demo.yaml")


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worlds, "run_world", in_this_process)
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = re.findall(r"^megavideo .*$", "\n".join(blocks), re.MULTILINE)
    assert len(commands) == 6
    for line in commands:
        words = shlex.split(line)[1:]
        words += SMALL.get(words[1], [])
        result = CliRunner().invoke(group, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    results = Path("runs/benchmark")
    names = ("step", "micro-batch", "layouts", "loader", "checkpoint")
    rows = {name: json.loads((results / f"{name}.json").read_text()) for name in names}
    assert [len(rows[name]) for name in names] == [2, 4, 3, 3, 4]
    assert [row["layout"] for row in rows["layouts"]] == ["dp2-zero1", "tp2", "pp2"]
    for name in names:
        assert (results / f"{name}.md").is_file() and (results / f"{name}.png").is_file()
    named = set(re.findall(r"configs/[\w/-]+\.yaml", PAGE.read_text()))
    made = {"configs/hardware/here.yaml"}  # by `megavideo calibrate`
    assert all((ROOT / name).is_file() for name in named - made)
