"""`megavideo train` and `evaluate` as a user runs them, on real shards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavideo.checkpoint.commit import newest_whole
from megavideo.checkpoint.manifest import MANIFEST, Manifest, Progress, read_manifest, read_training
from megavideo.train.metrics import read_rows
from tests.engine.dataset import make_dataset

pytestmark = pytest.mark.slow
ONE = [sys.executable, "-m", "megavideo"]
# --standalone lets torchrun find a free port by itself.
TWO = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
    *("--nproc-per-node", "2", "-m", "megavideo"),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run on a tiny data set."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def megavideo(
    command: str, dataset: Path, run: Path, *settings: str, launcher: list[str] = ONE
) -> subprocess.CompletedProcess[str]:
    """Run a subcommand to its end."""
    return subprocess.run(
        _line(launcher, command, dataset, run, *settings),
        env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def _line(launcher: list[str], command: str, dataset: Path, run: Path, *more: str) -> list[str]:
    return [*launcher, command, str(dataset), "--set", f"run.directory={run}", *more]


def trained(result: subprocess.CompletedProcess[str], run: Path) -> Manifest:
    """The newest checkpoint's manifest, after a command that must have succeeded."""
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", "DeepSpeed's chatter is kept from the terminal"
    checkpoint = newest_whole(run)
    assert checkpoint is not None
    return read_manifest(checkpoint / MANIFEST)


def progress_of(manifest: Manifest) -> Progress:
    assert manifest.training is not None
    return manifest.training.progress


@pytest.fixture(scope="module")
def unbroken(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps in one go."""
    run = tmp_path_factory.mktemp("unbroken")
    assert progress_of(trained(megavideo("train", dataset, run), run)).step == 20
    return run


def test_ten_steps_and_ten_more_equal_twenty(dataset: Path, unbroken: Path, tmp_path: Path) -> None:
    half = trained(megavideo("train", dataset, tmp_path, "--set", "recipe.steps=10"), tmp_path)
    assert progress_of(half).step == 10
    whole = trained(megavideo("train", dataset, tmp_path), tmp_path)
    expected = read_manifest(newest_whole(unbroken) / MANIFEST)  # type: ignore[operator]
    assert whole.seals == expected.seals, "weights and moments, by digest"
    bases = {m.training.base for m in (whole, expected, half) if m.training}
    assert len(bases) == 1, "frozen weights"
    losses = [[row.get("loss") for row in read_rows(run)] for run in (tmp_path, unbroken)]
    assert losses[0] == losses[1]


def test_a_signal_to_one_rank_saves_and_ends_well(dataset: Path, tmp_path: Path) -> None:
    settings = ("recipe.steps=100000", "model.text_slots=4")  # too few for any text: all are cut
    line = _line(TWO, "train", dataset, tmp_path, *(w for s in settings for w in ("--set", s)))
    with subprocess.Popen(line, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) as process:
        _wait_for(tmp_path / "checkpoints" / "latest", process)
        os.kill(_a_worker_of(process.pid), signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert "saving and stopping at step" in log
    checkpoint = newest_whole(tmp_path)
    assert checkpoint is not None
    step = read_training(checkpoint).progress.step
    assert f"stopping at step {step}" in log
    counts = [(row["step"], row["cut_texts"]) for row in read_rows(tmp_path) if "cut_texts" in row]
    assert counts and all(cut == 4 * step for step, cut in counts), "of both ranks' samples"


def _wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "the run ended early"
        assert time.monotonic() < end, "no checkpoint within a minute"
        time.sleep(0.05)


def _a_worker_of(launcher: int) -> int:
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(children[-1])


def test_a_wrong_world_size_is_told_once_and_starts_nothing(dataset: Path, tmp_path: Path) -> None:
    result = megavideo("train", dataset, tmp_path, "--set", "parallel.world_size=1", launcher=TWO)
    assert result.returncode != 0
    assert result.stderr.count("error: parallel.world_size=1, but 2 processes were started") == 1
    assert "Traceback" not in result.stderr.split("error: parallel")[0]
    assert not (tmp_path / "checkpoints").exists()


def test_a_loss_that_stays_nan_stops_with_the_step_and_the_remedy(
    dataset: Path, tmp_path: Path
) -> None:
    # A learning rate beyond float32 makes the weights infinite at the first step.
    harm = ("--set", "recipe.optimizer.lr=1e39", "--set", "recipe.optimizer.clip=0.0")
    result = megavideo("train", dataset, tmp_path, *harm)
    assert result.returncode == 1
    assert "not finite in 3 steps in a row, up to step 4 (recipe.nonfinite_limit)" in result.stderr
    assert "Traceback" not in result.stderr


def test_other_data_and_fresh_are_refused(dataset: Path, unbroken: Path, tmp_path: Path) -> None:
    other = make_dataset(tmp_path, num_clips=30)
    before = (unbroken / "config.yaml").read_text()
    result = megavideo("train", other, unbroken)
    assert result.returncode == 2
    assert "was trained on other data" in result.stderr
    assert (unbroken / "config.yaml").read_text() == before
    result = megavideo("train", dataset, unbroken, "--fresh")
    assert result.returncode == 2
    assert "--fresh" in result.stderr
    assert newest_whole(unbroken) is not None


def test_evaluate_writes_the_held_out_loss(dataset: Path, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "loss.json"
    more = ("--checkpoint", str(unbroken), "--json", str(output))
    result = megavideo("evaluate", dataset, tmp_path, *more)
    assert result.returncode == 0, result.stderr
    found = json.loads(output.read_text())
    rows = [row for row in read_rows(unbroken) if "held_out_loss" in row]
    assert found["samples"] == 10
    assert found["loss"] == pytest.approx(rows[-1]["held_out_loss"], rel=1e-6)
    by_frame = [value for name, value in found.items() if name.startswith("accuracy_frame_")]
    assert by_frame and found["accuracy"] == pytest.approx(sum(by_frame) / len(by_frame))
    assert all(0 <= value <= 1 for value in by_frame) and found["stage"] == "keyframes"
    result = megavideo("evaluate", dataset, tmp_path, *more, "--shuffle-captions")
    assert result.returncode == 0, result.stderr
    shuffled = json.loads(output.read_text())
    assert shuffled["captions"] == "shuffled"
    assert shuffled["loss"] != found["loss"]
