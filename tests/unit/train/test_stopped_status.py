"""What a run that stops, or never starts, tells the scheduler and the user."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from megavideo.train import command
from tests.engine.support import config

STEPS = 20


def test_other_ranks_leave_a_mistake_to_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(command.time, "sleep", waited.append)
    with pytest.raises(FileNotFoundError):
        command.load_on_all_ranks(("nowhere.yaml",), ())
    assert not waited
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        command.load_on_all_ranks(("nowhere.yaml",), ())
    assert waited == [command.LATE_S], "torchrun would end rank 0 before it has said anything"


@pytest.mark.parametrize(
    ("step", "wanted", "status"), [(7, None, 0), (7, "143", 143), (STEPS, "143", 0)]
)
def test_only_a_run_that_was_stopped_has_the_wanted_status(
    step: int, wanted: str | None, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, recipe={"steps": STEPS})
    run = SimpleNamespace(step=step)
    monkeypatch.setattr(command, "load_on_all_ranks", lambda files, assignments: settings)
    monkeypatch.setattr(command, "join_world", lambda *arguments: None)
    monkeypatch.setattr(command, "_open_run", lambda *arguments: run)
    monkeypatch.setattr(command, "train", lambda run: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    environment = {"MEGAVIDEO_STOPPED_STATUS": wanted} if wanted else {}
    assert CliRunner().invoke(command.main, [], env=environment).exit_code == status
