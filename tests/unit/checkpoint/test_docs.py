"""The commands of these pages run, one after another, on small checkpoints of those names."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from megavideo.cli import group
from tests.unit.checkpoint.samples import weights, write_run, write_split_sat

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(("page", "count"), [("convert.md", 15), ("checkpoints.md", 5)])
def test_the_commands_of_the_page_run(
    page: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "stage1")
    write_split_sat(tmp_path / "cogvideo-stage1", weights(), 2)
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == count
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "megavideo"
        result = CliRunner().invoke(group, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
