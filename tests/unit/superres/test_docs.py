"""The commands of docs/superres.md and docs/metrics.md run, on small files of those names."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from megavideo.cli import group
from tests.unit.superres.samples import write_base, write_clips, write_tokenizers

DOCS = Path(__file__).parents[3] / "docs"
FEWER = {
    "train-image-tokenizer": [
        "--steps=2",
        "--frames=20",
        "--batch=1",
        "--workers=1",
        "--device=cpu",
    ],
    "train-superres": ["--steps=2", "--workers=1", "--device=cpu", "--holdout=0.3"],
    "evaluate-videos": ["--frames=8", "--splits=2", "--device=cpu"],
}


class Middle(nn.Module):
    """Takes what the published I3D takes; as a classifier it is given nothing."""

    def forward(
        self,
        clips: Tensor,
        rescale: bool = True,
        resize: bool = True,
        return_features: bool = False,
    ) -> Tensor:
        return clips[:, :, :, 5, 5].mean(2)


@pytest.mark.parametrize("page", ["superres", "metrics"])
def test_the_commands_of_the_page_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megavideo.data.image_training.SEED_FRAMES", 8)
    for folder in ("clips", "real", "generated"):
        write_clips(tmp_path / folder)
    write_tokenizers(tmp_path, codes=256)
    write_base(tmp_path / "base", codes=256, side=8)
    for name in ("i3d_torchscript.pt", "c3d.safetensors"):  # C3D itself has 300 MB
        torch.jit.script(Middle()).save(name)
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / f"{page}.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == {"superres": 3, "metrics": 2}[page]
    for line in commands:
        program, name, *arguments = shlex.split(line)
        assert program == "megavideo"
        result = CliRunner().invoke(group, [name, *arguments, *FEWER[name]], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output}"
