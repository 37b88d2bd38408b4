"""What the doctor makes of facts and figures: the odd node is named, a remedy is said."""

from dataclasses import replace
from pathlib import Path

import pytest

from megavideo.config.load import load_config
from megavideo.doctor import judge, storage
from megavideo.doctor.facts import GIB, Facts, with_own_names
from megavideo.doctor.network import Link, judge_clocks, judge_links, judge_within
from megavideo.doctor.verdict import Verdict, failed, listed

CONFIGS = Path(__file__).parents[3] / "configs"
GPU = "NVIDIA H100 80GB HBM3 79 GiB"
ONE = Facts(
    rank=0,
    local_rank=0,
    node="n0",
    group=0,
    versions={"python": "3.11.9", "torch": "2.13.0"},
    gpus=(GPU,) * 2,
    apex=None,
    kernels=None,
    prebuilt=(),
    locked_memory=None,
    open_files=None,
    shm=16 * GIB,
    infiniband=True,
    free_port=True,
    usual_port_taken=False,
    missing=(),
)


def cluster(nodes: int = 3, each: int = 2, **odd: object) -> list[Facts]:
    """Equal nodes n0, n1, ..., but for what `odd` says of the last."""
    facts = [
        replace(ONE, rank=n * each + i, local_rank=i, node=f"n{n}", group=n)
        for n in range(nodes)
        for i in range(each)
    ]
    return [replace(f, **odd) if f.node == f"n{nodes - 1}" else f for f in facts]  # type: ignore[arg-type]


def found(facts: list[Facts], check: str) -> Verdict:
    (verdict,) = [v for v in judge.judge(facts) if v.check == check]
    return verdict


def test_equal_nodes_pass_every_check() -> None:
    verdicts = judge.judge(cluster())
    assert {verdict.level for verdict in verdicts} == {"ok"}, verdicts
    assert not failed(verdicts)


@pytest.mark.parametrize(
    ("odd", "check", "level", "words"),
    [
        ({"versions": {"python": "3.11.9", "torch": "2.12.0"}}, "versions", "fail", "torch 2.12.0"),
        ({"versions": {"python": "3.11.9"}}, "versions", "fail", "torch none on n2, 2.13.0 else"),
        ({"gpus": (GPU,)}, "GPUs", "fail", "fewer GPUs than processes on n2"),
        ({"gpus": ()}, "GPUs", "fail", "none, training on the CPU on n2"),
        ({"gpus": ("A100",) * 2}, "GPUs", "warn", "2 x A100 on n2, 2 x NVIDIA H100"),
        ({"locked_memory": 65536}, "locked memory", "fail", "n2: NCCL will fail"),
        ({"open_files": 1024}, "open files", "warn", "only 1,024 on n2"),
        ({"shm": 64 * 2**20}, "shared memory", "fail", "0.06 GiB on n2"),
        ({"free_port": False}, "ports", "fail", "on n2"),
        ({"usual_port_taken": True}, "ports", "warn", "29500, the usual rendezvous port"),
        ({"missing": ("data/train",)}, "files", "fail", "data/train missing on n2: mount"),
        ({"apex": "No module named 'apex'"}, "apex", "warn", "not on n2"),
        ({"kernels": "no nvcc"}, "CUDA kernels", "warn", "slower, on n2 (n2: no nvcc)"),
    ],
)
def test_an_odd_node_is_named(odd: dict[str, object], check: str, level: str, words: str) -> None:
    verdict = found(cluster(**odd), check)
    assert verdict.level == level
    assert words in verdict.text


def test_limits_that_nothing_needs_are_no_warning() -> None:
    small = {"infiniband": False, "locked_memory": 65536, "gpus": (), "shm": 0}
    verdicts = judge.judge([replace(fact, **small) for fact in cluster()])  # type: ignore[arg-type]
    assert {verdict.level for verdict in verdicts} == {"ok"}


def test_nodes_of_one_name_are_told_apart_by_number() -> None:
    facts = with_own_names([replace(fact, node="localhost") for fact in cluster(2)])
    assert [fact.node for fact in facts] == ["localhost#0"] * 2 + ["localhost#1"] * 2
    assert with_own_names(cluster(2)) == cluster(2)


def test_a_slow_link_is_named() -> None:
    links = [Link("n0", "n1", 11.0), Link("n1", "n2", 1.0), Link("n2", "n0", 12.0)]
    verdict = judge_links("9 GB/s", links)
    assert verdict.level == "warn"
    assert "n1 to n2 1.000, usual 11.000" in verdict.text
    assert judge_links("9 GB/s", links[::2]).level == "ok"


def test_a_slow_node_is_named() -> None:
    verdict = judge_within({"n0": 200.0, "n1": 210.0, "n2": 20.0})
    assert verdict.level == "warn"
    assert "n2 less than half" in verdict.text
    assert judge_within({"n0": 0.0}).level == "ok"


@pytest.mark.parametrize(("offset", "level"), [(0.01, "ok"), (-2.0, "warn"), (-31.0, "fail")])
def test_a_clock_that_torchrun_would_mistrust_is_named(offset: float, level: str) -> None:
    verdict = judge_clocks({"n1": 0.001, "n2": offset})
    assert verdict.level == level
    assert f"n2's is {offset:+.3f} s" in verdict.text


def test_many_nodes_are_counted_instead_of_listed() -> None:
    assert listed([f"n{i}" for i in range(100)]).endswith("n7 and 92 more")


def test_storage_is_measured_and_left_clean(tmp_path: Path) -> None:
    rates = storage.measure(tmp_path)
    assert rates.bytes_per_s > 0 and rates.fsync_s > 0
    assert not list(tmp_path.iterdir())
    assert storage.existing(tmp_path / "runs" / "new") == tmp_path
    slow = storage.judge_rates(tmp_path, storage.Rates(20e6, 0.01), 2 * 10**9)
    assert slow.level == "warn" and "a checkpoint takes 100 s" in slow.text
    assert storage.judge_shared(tmp_path, ["n2"], 3).level == "fail"


def test_space_is_asked_for_the_checkpoints_of_the_published_model(tmp_path: Path) -> None:
    files = [
        CONFIGS / name
        for name in ("model/cogvideo-9b.yaml", "recipe/stage1.yaml", "data/local.yaml")
    ]
    config = load_config(files, ["run.directory=runs/a"])
    needed = storage.sizes(config)
    assert needed.checkpoint == 1_818_820_608 * 12  # float32 weights and two moments
    assert needed.base == 5_902_307_328 * 2  # bf16
    enough = config.model_copy(update={"run": config.run.model_copy(update={"keep_last": 10**9})})
    assert storage.judge_space(tmp_path, enough).level == "fail"
