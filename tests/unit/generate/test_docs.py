"""The commands of docs/generate.md run, one after another, on small runs of those names."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from megavideo.cli import group
from megavideo.data.video import write_video
from tests.unit.generate.runs import PROMPTS, make_refinement, make_runs, make_superres

PAGE = Path(__file__).parents[3] / "docs" / "generate.md"


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_runs(tmp_path)
    make_superres(tmp_path)
    make_refinement(tmp_path)
    (tmp_path / "runs").mkdir()
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).rename(tmp_path / "runs" / stage)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    frames = np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), np.uint8)
    Image.fromarray(frames[0]).save("start.png")
    write_video("slow.mp4", frames, 1.0)
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 10
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "megavideo"
        result = CliRunner().invoke(group, arguments, catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert len(list((tmp_path / "keyframes").iterdir())) == 2 * len(PROMPTS)
    for folder in ("videos", "started", "smooth", "large", "refined", "enlarged", "guided"):
        (made,) = (tmp_path / folder).iterdir()
        assert (made / "about.json").is_file()
