"""The doctor at work: alone from the command line, and among processes."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megavideo.doctor import command, network
from megavideo.doctor.facts import collect
from tests.engine.dataset import make_dataset
from tests.world import run_world


def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "megavideo", "doctor", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run on a tiny data set."""
    return make_dataset(tmp_path_factory.mktemp("dataset"))


def test_one_process_gets_a_verdict_a_line_and_status_0(config: Path) -> None:
    result = doctor(str(config))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    for check in ("versions", "clocks", "shared folder", "storage", "disk space", "configuration"):
        assert any(line[6:].startswith(check) for line in lines), check
    assert not (config.parent / "run").exists(), "the doctor makes no folders"


def test_what_would_stop_training_gives_status_1_and_the_remedy(config: Path) -> None:
    result = doctor(
        str(config), "--set", "data.train=nowhere", "--set", "recipe.micro_batch=3",
        "--set", "parallel.world_size=8",
    )  # fmt: skip
    assert result.returncode == 1
    assert "fail  files          nowhere missing" in result.stdout
    assert "fail  configuration  parallel.world_size=8, but 1 process was started" in result.stdout


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


def _two_nodes(rank: int, folder: Path) -> None:
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


def test_clocks_and_links_are_measured_between_processes(tmp_path: Path) -> None:
    run_world(_two_nodes, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
