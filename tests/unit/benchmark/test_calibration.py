"""Calibration in small: every rate is measured, and the profile is one that a plan reads back."""

import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from megavideo.benchmark.calibration import command, links
from megavideo.benchmark.calibration.clock import seconds_of
from megavideo.benchmark.calibration.compute import (
    Sizes,
    attention_rates,
    gemm_points,
    pointwise_rates,
)
from megavideo.benchmark.calibration.program import _passes
from megavideo.config.load import load_config
from megavideo.layout.grid import Grid
from megavideo.parallel import collectives
from megavideo.parallel.mesh import Axis
from megavideo.plan.command import UNUSED
from megavideo.plan.hardware import Link, load_hardware
from megavideo.plan.predict import predict

CPU = torch.device("cpu")
TINY = Sizes((8, 64), (16, 32), Grid(8, 3, 4), 1, 2, 16, (64, 32), (64, 32))
ROOT = Path(__file__).parents[3]


def figures() -> command.Figures:
    """As the ranks of a calibration measure them, without other ranks."""
    backend, attention = attention_rates(TINY, torch.float32, CPU, 2)
    forward, backward = _passes(2, CPU, 2)
    return {
        "backend": backend,
        "gemm": {"fp32": gemm_points(TINY, torch.float32, CPU, 2)},
        "attention": attention,
        "pointwise": pointwise_rates(TINY, torch.float32, CPU, 2),
        "overhead": {
            "layer_forward_ms": 1e3 * forward,
            "layer_backward_ms": 1e3 * backward,
            "micro_batch_ms": 0.0,
            "step_ms": 1.0,
        },
        "link": link_of_two(),
        "disk": 1.0,
    }


def link_of_two() -> dict[str, Any]:
    """With collectives that do nothing in the place of another rank's answer."""
    with mock.patch.object(collectives, "dist"), mock.patch.object(links, "dist"):
        return links.measure_link(Axis(0, 2, (0, 1)), CPU, 2)


def test_links_are_measured_by_the_collectives_that_layers_call() -> None:
    with mock.patch.object(collectives, "dist") as dist, mock.patch.object(links, "dist"):
        found = links.measure_link(Axis(0, 2, (0, 1)), CPU, 2)
    assert dist.all_reduce.called and dist.reduce_scatter_tensor.called
    whole, part = dist.all_gather_into_tensor.call_args.args
    assert whole.nbytes == 2 * part.nbytes == links.LARGE_BYTES["cpu"]
    link = Link.model_validate(found)
    for rate in (link, link.all_gather, link.reduce_scatter):
        assert rate is not None and rate.latency_us > 0


def measured_here(
    function: object, count: int, folder: Path, *arguments: object, deadline_s: float
) -> None:
    """In place of `run_world`."""
    (folder / "figures.json").write_text(json.dumps(figures()))


def test_a_calibration_is_a_profile_that_a_plan_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_world", measured_here)
    output = tmp_path / "here.yaml"
    result = CliRunner().invoke(command.main, ["--output", str(output)], catch_exceptions=False)
    assert "CPU core" in result.output and "2 at once" in result.output
    hardware = load_hardware(str(output))
    assert hardware.measured and hardware.kind == "cpu" and hardware.name == "here"
    assert len(hardware.gemm["fp32"]) == 2 * 4 + 4
    assert {"layer_norm_backward", "gelu", "mix_backward", "softmax", "adam"} <= set(
        hardware.pointwise_gb_per_s
    )
    files = [ROOT / "configs/model/tiny.yaml", ROOT / "configs/recipe/demo-stage1.yaml"]
    found = predict(load_config(files, UNUSED), 2, hardware)
    assert 0 < found.step_s < 10 and found.parts["reduction"] > 0


def test_one_process_says_that_its_links_are_assumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(command, "run_world", measured_here)
    output = tmp_path / "here.yaml"
    result = CliRunner().invoke(command.main, ["--output", str(output), "--processes", "1"])
    assert result.exit_code == 0 and "1 at once" in result.output
    assert "are assumed (all-reduce" in caplog.text
    assert "node_link is assumed" in output.read_text()


def test_other_programs_do_not_count_on_a_cpu() -> None:
    found = seconds_of({"sleep": lambda: time.sleep(0.01)}, CPU, 2)
    assert found["sleep"] < 0.005


def test_the_disk_is_written_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(links.DISK_BYTES, "cpu", 16 << 20)
    assert links.measure_disk(tmp_path, CPU) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_calibrate_this_machine(tmp_path: Path) -> None:
    output, joined_before = tmp_path / "here.yaml", dist.is_initialized()
    CliRunner().invoke(
        command.main, ["--output", str(output), "--rounds", "3"], catch_exceptions=False
    )
    hardware = load_hardware(str(output))
    assert hardware.devices_per_node == 2
    link = hardware.node_link
    assert link.all_gather is not None and link.reduce_scatter is not None
    assert link.latency_us > 0 and hardware.overhead.step_ms > 0
    assert dist.is_initialized() == joined_before
