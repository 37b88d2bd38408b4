"""The commands of docs/planning.md run, and the table it shows is the one that they print."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from megavideo.benchmark.calibration import command
from megavideo.cli import group
from tests.unit.benchmark.test_calibration import measured_here

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "planning.md"


def test_the_commands_of_the_page_run_and_print_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calibration measures in small here; tests/unit/benchmark has it whole."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "run_world", measured_here)
    page = PAGE.read_text()
    commands = re.findall(
        r"^megavideo .*$", "\n".join(re.findall(r"```sh\n(.*?)```", page, re.S)), re.M
    )
    assert len(commands) == 4
    printed = []
    for line in commands:
        result = CliRunner().invoke(group, shlex.split(line)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
        printed.append(result.output)
    shown = re.search(r"```\n(104 x .*?)```", page, re.S)
    assert shown and shown[1] in printed[0]
    assert Path("runs/planned.yaml").is_file() and Path("runs/planned.png").is_file()
