"""`megavideo benchmark step|layouts|loader|checkpoint` and --compare, on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from megavideo.benchmark import layouts_command, worlds
from megavideo.benchmark.command import main
from megavideo.benchmark.plan_check import rank_correlation
from megavideo.benchmark.step import PHASES, Window
from megavideo.benchmark.step_command import ALWAYS, UNUSED, search
from megavideo.config.load import load_config
from megavideo.engine.errors import RunFailed
from megavideo.engine.phases import Phases
from megavideo.engine.world import World
from megavideo.ops import pointwise
from megavideo.plan.hardware import load_hardware
from tests.engine.dataset import make_dataset

TINY = [
    "configs/model/tiny.yaml", "configs/recipe/demo-stage1.yaml", "configs/parallel/laptop.yaml",
    "--set", "recipe.batch=4", "--set", "recipe.micro_batch=2",
]  # fmt: skip
FEW = ["--warmup", "1", "--steps", "2", "--split-steps", "1"]


@pytest.fixture(autouse=True)
def keep_the_world(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands leave the process group that all engine tests share as they found it."""
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


def assert_whole(row: dict[str, Any]) -> None:
    """Every figure, and what it must be read with."""
    step = row["step_s"]
    assert 0 < step["p20"] <= step["p50"] <= step["p80"]
    assert row["clips_per_s"] == pytest.approx(4 / step["p50"])
    assert row["tokens_per_s"] == pytest.approx(row["clips_per_s"] * (8 + 5 * 16))
    assert 0 < row["mfu"] < row["mfu_6n"] and row["mfu"] < row["hfu"]
    assert row["peak_tflops"] > 0 and row["peak_from"]
    assert row["processor_s"] > 0
    assert len(row["memory_gib"]) == len(row["rank_p50_s"]) == row["processes"]
    assert list(row["split_s"]) == list(PHASES)
    assert row["split_s"]["forward"] > 0 < row["split_s"]["backward"]
    assert row["split_s"]["optimizer"] > 0
    assert row["skew"]["slowest_over_mean"] >= 1
    assert all(row[key] for key in ("device", "torch", "deepspeed", "date"))
    assert row["config"]["recipe"]["batch"] == 4


def test_a_step_is_measured_beside_the_published_one_and_one_that_is_not_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "BACKEND", "aot_eager")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    pointwise.compiled.cache_clear()
    against = ["--set", "parallel.compile=true", "--against", "published", "--against", "eager"]
    output = run("step", *TINY, *FEW, "--output", str(tmp_path), *against, "--trace")
    pointwise.compiled.cache_clear()
    ours, theirs, plain = rows_of(tmp_path / "step.json")
    named = [(row["contender"], row["layout"]) for row in (ours, theirs, plain)]
    assert named == [("megavideo", "zero1-compile"), ("published", "zero1"), ("eager", "zero1")]
    for row in (ours, theirs, plain):
        assert_whole(row)
        assert f"{row['tokens_per_s']:,.0f}" in output
        assert row["split_s"]["pipeline"] == 0
    assert ours["ratio"] == 1
    assert theirs["ratio"] == pytest.approx(ours["step_s"]["p50"] / theirs["step_s"]["p50"])
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert json.loads((tmp_path / "trace-rank0.json").read_text())["traceEvents"]

    file = str(tmp_path / "step.json")
    compared = run("--compare", file, file)
    assert compared.count("| 1.000 |") == 3 * 4
    with pytest.raises(ValueError, match="is not what a benchmark wrote"):
        run("--compare", file, str(tmp_path / "step.md"))


def test_data_and_loader_read_real_shards(tmp_path: Path) -> None:
    config = str(make_dataset(tmp_path))
    output = ["--output", str(tmp_path), "--set", "run.evaluate_every=0"]
    run("loader", config, *output, "--threads", "1 2", "--samples", "8")
    rows = rows_of(tmp_path / "loader.json")
    assert [row["threads"] for row in rows] == [1, 2]
    assert all(row["samples_per_s"] > 0 and row["bad_samples"] == 0 for row in rows)
    run("step", config, *output, *FEW, "--data", "--accumulate", "1")
    (row,) = rows_of(tmp_path / "step.json")
    assert row["data"] == str(tmp_path / "train") and row["micro_batches"] == 1
    assert row["split_s"]["data"] > 0


def test_a_checkpoint_is_measured_beside_a_plain_copy(tmp_path: Path) -> None:
    run("checkpoint", *TINY, "--output", str(tmp_path), "--rounds", "2")
    rows = {row["subject"]: row for row in rows_of(tmp_path / "checkpoint.json")}
    assert rows["plain copy with fsync, cold"]["times_copy"] == 1
    assert all(row["seconds"] > 0 and row["mib"] > 0.1 for row in rows.values())
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint.json", "checkpoint.md", "checkpoint.png"}


def test_a_pipelines_bubble_is_measured(tmp_path: Path) -> None:
    output = run("layouts", *TINY, *FEW, "--output", str(tmp_path), "--layouts", "pp2-vp1")
    (row,) = rows_of(tmp_path / "layouts.json")
    assert_whole(row)
    assert row["processes"] == 2 and "megavideo, pp2-vp1" in output
    assert row["split_s"]["pipeline"] > 0
    assert row["ideal_bubble"] == pytest.approx(1 / 3)


def test_a_layout_that_fails_has_a_reason_and_the_others_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_place_of_a_world(function, world_size, case, window, folder, deadline_s):  # type: ignore[no-untyped-def]
        if case.name == "dp2-zero3":
            raise RunFailed("rank 1 failed first:\nTraceback ...\nOutOfMemoryError: so many GiB\n")
        function(0, case, window, folder)

    monkeypatch.setattr(worlds, "run_world", in_place_of_a_world)
    hardware = load_hardware("h100-80").model_copy(update={"kind": "cpu"})
    monkeypatch.setattr(layouts_command, "load_hardware", lambda name: hardware)
    profile = ["--check-plan", "like-a-cpu", "--set", "recipe.precision=bf16"]
    names = "dp1-zero1 dp2-zero3 dp1-recompute"
    output = run("layouts", *TINY, *FEW, "--output", str(tmp_path), "--layouts", names, *profile)
    first, failed, last = rows_of(tmp_path / "layouts.json")
    assert failed["reason"] == "OutOfMemoryError: so many GiB"
    assert "- megavideo, dp2-zero3: OutOfMemoryError: so many GiB" in output
    for row in (first, last):
        assert_whole(row)
        error = row["predicted_s"] / row["step_s"]["p50"] - 1
        assert row["prediction_error"] == pytest.approx(error)
        error = row["predicted_processor_s"] / row["processor_s"] - 1
        assert row["processor_error"] == pytest.approx(error)
        assert f"| {1e3 * row['processor_s']:.4g} | {error:+.0%} |" in output
    assert last["ratio"] == pytest.approx(first["step_s"]["p50"] / last["step_s"]["p50"])


@pytest.mark.slow
def test_a_search_goes_on_after_running_out_of_memory() -> None:
    settings = ["model.hidden=512", "recipe.batch=4"]
    base = load_config(TINY[:3], [*UNUSED, *settings, *ALWAYS])

    def try_out(number: int) -> dict[str, Any]:
        """Two worlds: of one sample, and of more than 2 GiB hold."""
        sizes = {"micro_batch": 1} if number == 1 else {"micro_batch": 512, "batch": 512}
        recipe = base.recipe.model_copy(update=sizes)
        case = worlds.Case("one", base.model_copy(update={"recipe": recipe}), 1, memory_gib=2.0)
        return worlds.measure_case(case, Window(0, 2, 1), deadline_s=300)

    one, more = search(try_out, 64)
    assert one["clips_per_s"] > 0
    assert "can't allocate memory" in more["reason"]


def try_up_to(limit: int) -> Callable[[int], dict[str, Any]]:
    return lambda n: {"micro_batch": n} | ({"reason": "out of memory"} if n > limit else {})


def test_a_search_doubles_until_one_fails_and_tries_half_way_back() -> None:
    assert [row["micro_batch"] for row in search(try_up_to(7), 64)] == [1, 2, 4, 6, 8]
    assert [row["micro_batch"] for row in search(try_up_to(1), 64)] == [1, 2]
    assert [row["micro_batch"] for row in search(try_up_to(99), 4)] == [1, 2, 4]
    with pytest.raises(ValueError, match=r"not even recipe\.micro_batch=1"):
        search(try_up_to(0), 64)


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"add --set parallel\.compile=true"):
        run("step", *TINY, "--output", "never", "--against", "eager")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no GPU here"):
        run("step", *TINY, "--output", "never", "--memory-snapshot")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="without torchrun"):
        run("step", *TINY, "--output", "never", "--find-micro-batch")


def test_time_inside_another_phase_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    phases = Phases(torch.device("cpu"))
    with phases("backward"), phases("reduction"):
        pass
    assert phases.seconds == {"backward": 1.0 + 4.0, "reduction": 2.0}


def test_rank_correlation_is_one_for_equal_orders() -> None:
    assert rank_correlation([1, 2, 5], [2, 3, 4]) == pytest.approx(1)
    assert rank_correlation([1, 2, 5], [4, 3, 2]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 5], [3, 3, 4]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
