"""`megavideo report` on a base and a video run, trained for a few steps."""

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from megavideo.analysis.command import main as analyze
from megavideo.data.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from megavideo.report.command import main
from tests.engine.dataset import CODES, make_dataset
from tests.engine.test_train_command import megavideo

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `base` and `stage1`, the latter evaluated both ways."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = make_dataset(folder)
    base, stage1 = folder / "base", folder / "stage1"
    for run, *settings in (
        (base, "recipe.stage=image"),
        (stage1, f"recipe.base={base}", "run.evaluate_every=2", "run.peak_tflops=2.5"),
    ):
        few = ("recipe.steps=4", "run.log_every=1", "run.evaluate_samples=8", *settings)
        done = megavideo("train", dataset, run, *(x for s in few for x in ("--set", s)))
        assert done.returncode == 0, done.stderr
    for captions, *flag in (("right",), ("shuffled", "--shuffle-captions")):
        output = str(stage1 / f"held-out-{captions}.json")
        done = megavideo(
            "evaluate", dataset, stage1, "--checkpoint", str(stage1), "--json", output, *flag
        )
        assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    config = ImageTokenizerConfig(channels=8, z_channels=8, num_codes=CODES)
    ImageTokenizer(config).save(folder / "image.safetensors")
    return folder


def report(runs: Path, *names: str) -> str:
    arguments = [*(str(runs / name) for name in names), "--output", str(runs / "report")]
    tokenizer = ["--image-tokenizer", str(runs / "image.safetensors"), "--samples", "2"]
    result = CliRunner().invoke(main, [*arguments, *tokenizer], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return (runs / "report" / "report.md").read_text()


def test_a_report_shows_figures_captions_and_the_frozen_digest(runs: Path) -> None:
    page = report(runs, "base", "stage1")
    assert "| base | image | 4 |" in page
    assert "| stage1 | keyframes | 4 |" in page
    assert "| run | samples | right captions | shuffled captions | difference |" in page
    assert "| equal |" in page and "CHANGED" not in page
    assert re.search(r"\| stage1 \| [\d.]+% \| [\d.]+% \| [\d.]+% \| 2\.5 \|", page)
    for picture in ("losses.png", "predictions-base.png", "predictions-stage1.png"):
        assert picture in page
        assert Image.open(runs / "report" / picture).getcolors(2) is None, "more than two colours"


def test_a_runs_channels_are_drawn(runs: Path) -> None:
    arguments = [str(runs / "stage1"), "--output", str(runs / "analysis"), "--samples", "3"]
    result = CliRunner().invoke(analyze, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    heads, *rows = (runs / "analysis" / "attention.csv").read_text().splitlines()
    assert heads == "layer,head,text,own frame,earlier frames,later frames"
    assert len(rows) == 4
    for row in rows:
        assert sum(map(float, row.split(",")[2:])) == pytest.approx(1, abs=1e-5)
        assert float(row.split(",")[-1]) == 0  # keyframes are causal
    assert len((runs / "analysis" / "mixture.csv").read_text().splitlines()) == 3
    for picture in ("mixture.png", "attention.png"):
        assert Image.open(runs / "analysis" / picture).width > 400
    with pytest.raises(ValueError, match="text-to-image run"):
        arguments = [str(runs / "base"), "--output", str(runs / "analysis")]
        CliRunner().invoke(analyze, arguments, catch_exceptions=False)


def test_another_base_than_before_is_called_changed(runs: Path) -> None:
    config = runs / "stage1" / "config.yaml"
    text = config.read_text()
    other = Path(__file__).parents[1] / "reference" / "vectors" / "pub_ckpt_base"
    config.write_text(text.replace(str(runs / "base"), str(other)))
    try:
        assert "**CHANGED**" in report(runs, "stage1")
    finally:
        config.write_text(text)


def test_a_folder_that_is_no_run_is_refused(runs: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run"):
        CliRunner().invoke(
            main, [str(runs / "train"), "--output", str(runs / "nothing")], catch_exceptions=False
        )
    assert not (runs / "nothing").exists()
