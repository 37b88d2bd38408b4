"""The doctor at work, alone and among processes; docs/cluster.md's test runs the command."""

import errno
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from megavideo.config.load import load_config
from megavideo.doctor import command, judge, network, storage
from megavideo.doctor.facts import collect
from megavideo.doctor.verdict import Level, Verdict
from megavideo.engine.world import join_world
from tests.engine.dataset import make_dataset
from tests.world import run_world


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run on a tiny data set."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.mark.parametrize("level", ["ok", "warn", "fail"])
def test_only_a_failure_gives_status_1(level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [Verdict("ok", "clocks", "one node"), Verdict(level, "storage", "so and so")]
    monkeypatch.setattr(command, "_together", lambda *arguments: verdicts)
    result = CliRunner().invoke(command.main, [])
    assert result.exit_code == (level == "fail")
    assert result.stdout.splitlines()[-1] == f"{level:5} storage        so and so"


def test_a_missing_file_and_an_impossible_layout_would_stop_training(config: Path) -> None:
    wrong = load_config([config], ["data.train=nowhere", "parallel.world_size=8"])
    missing = judge.paths([collect(command._paths(wrong))])
    assert missing == Verdict(
        "fail", "files", f"nowhere missing on {collect().node}: make it, or correct the path"
    )
    layout = command._layout(wrong, 2)
    assert layout.level == "fail"
    assert "parallel.world_size=8, but 2 processes were started" in layout.text


def test_commands_and_urls_of_shards_are_no_files(config: Path, tmp_path: Path) -> None:
    places = [
        "data.allow_commands=true",
        "data.train=pipe:cat x",
        f"data.validation=file://{tmp_path}",
    ]
    paths = command._paths(load_config([config], places))
    assert "pipe:cat x" not in paths and str(tmp_path) in paths


def test_a_folder_that_cannot_be_written_to_is_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert str(command._mark(Path("/proc"))).startswith(
        "fail  shared folder  cannot write to /proc"
    )
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(storage, "measure", Mock(side_effect=full))
    verdict = command._rates(tmp_path, None)
    assert (verdict.level, verdict.check) == ("fail", "storage") and "No space" in verdict.text


def test_a_node_that_reaches_nobody_says_so_with_what_it_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def join_world(timeout_minutes: float) -> None:
        raise dist.DistNetworkError("connection refused\nand a long trace")

    monkeypatch.setattr(command, "join_world", join_world)
    facts = replace(collect(), rank=3, local_rank=1, node="h2")
    first, *others = command._together(facts, None, None, 15.0)
    assert str(first).startswith("fail  rendezvous     rank 3 on h2 does not reach all")
    assert "within 15 s" in first.text and "(connection refused)" in first.text
    assert others[0].check == "versions"


def _two_nodes(rank: int, folder: Path, config: Path) -> None:
    verdicts = command._examine(join_world(1.0), collect(), load_config([config]), None)
    assert {verdict.level for verdict in verdicts} <= {"ok", "warn"}, verdicts
    checks = {"versions", "clocks", "shared folder", "storage", "disk space", "configuration"}
    assert checks <= {verdict.check for verdict in verdicts}
    assert not (config.parent / "run").exists(), "the doctor makes no folders"
    clock = time.time if rank == 0 else lambda: time.time() + 5.0
    offsets = network.clock_offsets([0, 1], torch.device("cpu"), clock)
    assert offsets == ({1: pytest.approx(5.0, abs=0.2)} if rank == 0 else {})
    facts: list = [None, None]
    dist.all_gather_object(facts, collect())
    same, within = facts, network.bandwidth(facts, torch.device("cpu"))
    assert [v.check for v in within] == ["within a node"]
    apart = [
        type(fact)(**{**vars(fact), "local_rank": 0, "node": f"n{fact.rank}"}) for fact in same
    ]
    alone, between = network.bandwidth(apart, torch.device("cpu"))
    assert "nothing to measure" in alone.text
    assert "all-reduce over 2 nodes" in between.text
    (folder / f"{rank}").write_text("done")


def test_two_processes_are_examined_and_measured(config: Path, tmp_path: Path) -> None:
    run_world(_two_nodes, 2, tmp_path, config)
    assert len(list(tmp_path.iterdir())) == 2
