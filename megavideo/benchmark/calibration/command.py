"""`megavideo calibrate`: measure this machine, and write what `megavideo plan` needs of it."""

import json
import os
import tempfile
from io import StringIO
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from ruamel.yaml import YAML

from megavideo.benchmark.calibration.compute import (
    attention_rates,
    gemm_points,
    pointwise_rates,
    sizes_of,
)
from megavideo.benchmark.calibration.links import measure_disk, measure_link
from megavideo.benchmark.calibration.program import measure_overhead
from megavideo.benchmark.harness import environment
from megavideo.engine.errors import RunFailed
from megavideo.engine.launch import run_world
from megavideo.engine.world import join_world
from megavideo.files import atomic_write
from megavideo.log import log
from megavideo.model.execution import DTYPES
from megavideo.plan.hardware import Hardware, Link, load_hardware

Figures = dict[str, Any]
DEADLINE_S = 900.0
# Where nothing can be measured: an adapter of 200 Gbit/s.
ASSUMED_LINK = {"latency_us": 20.0, "gb_per_s": 25.0}


@click.command()
@click.option(
    "--output", required=True, type=click.Path(path_type=Path),
    help="Profile to write, as configs/hardware/here.yaml; its disk is measured too.",
)  # fmt: skip
@click.option(
    "--processes", type=click.IntRange(1),
    help="Processes that compute at the same time; by default one a GPU, or two without GPUs.",
)  # fmt: skip
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(list(DTYPES)),
    help="Of matrix products; may be repeated. By default bf16 on GPUs and fp32 without.",
)  # fmt: skip
@click.option("--rounds", default=20, show_default=True, help="Timings of which the median counts.")
def main(output: Path, processes: int | None, precisions: tuple[str, ...], rounds: int) -> None:
    """Measure this machine: matrix products by shape, attention, pointwise operations, the
    program's own time, collectives between processes, and the disk.

    All processes measure at the same time, as they train. The network between nodes cannot be
    measured from one: it is written as fast as the link inside the node, to be edited. One process
    measures no link: the profile then has an assumed one.

    \b
    Example:
      megavideo calibrate --output configs/hardware/here.yaml
      megavideo plan configs/model/demo.yaml configs/recipe/demo-stage1.yaml \\
          --gpus 2 --gpu configs/hardware/here.yaml
    """
    gpus = torch.cuda.device_count()
    count = processes or gpus or 2
    wanted = precisions or (("bf16",) if gpus else ("fp32",))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = (folder, str(output.parent), wanted, rounds)
        try:
            run_world(_measure, count, *arguments, deadline_s=DEADLINE_S)
        except RunFailed as error:
            raise click.ClickException(str(error)) from None
        figures = json.loads((folder / "figures.json").read_text())
    profile = Hardware.model_validate(_profile(output.stem, count, figures), strict=False)
    with atomic_write(output) as file:
        file.write(_yaml(profile).encode())
    load_hardware(str(output))
    log.info("wrote %s", output)
    if count == 1:
        log.warning(
            "one process measures no link: node_link and network of %s are assumed (%s); edit them "
            "before planning for more than one device",
            *(output, _link(profile.node_link)),
        )
    click.echo(_summary(profile))


def _measure(rank: int, folder: Path, disk: str, precisions: tuple[str, ...], rounds: int) -> None:
    """Every rank measures; the slowest counts where they differ little, rank 0's elsewhere."""
    world = join_world(timeout_minutes=30.0)
    sizes, device = sizes_of(world.device), world.device
    dtype = DTYPES[precisions[0]]
    backend, attention = attention_rates(sizes, dtype, device, rounds)
    figures: Figures = {
        "backend": backend,
        "gemm": {p: gemm_points(sizes, DTYPES[p], device, rounds) for p in precisions},
        "attention": attention,
        "pointwise": pointwise_rates(sizes, dtype, device, rounds),
        "overhead": measure_overhead(world, folder / "run", rounds),
        "link": measure_link(world.mesh.dp, device, rounds) if world.size > 1 else ASSUMED_LINK,
    }
    dist.barrier()
    if rank == 0:
        figures["disk"] = measure_disk(Path(disk), device)
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()


def _profile(name: str, devices: int, figures: Figures) -> Figures:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    about = environment(device)
    best = {p: max(point[3] for point in points) for p, points in figures["gemm"].items()}
    return {
        "name": name,
        "device": about["device"] if gpu else f"CPU core ({_processor()})",
        "source": f"megavideo calibrate, {about['date']}, torch {about['torch']}",
        "measured": True,
        "kind": "gpu" if gpu else "cpu",
        "attention": figures["backend"],
        "memory_gib": _memory_gib(devices),
        "reserve_gib": 4.0 if gpu else 0.5,
        "devices_per_node": devices,
        "peak_tflops": best,
        "gemm": figures["gemm"],
        "attention_tflops": figures["attention"],
        "pointwise_gb_per_s": figures["pointwise"],
        "overhead": figures["overhead"],
        "node_link": figures["link"],
        "network": figures["link"],
        "disk_gb_per_s": figures["disk"],
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def _memory_gib(devices: int) -> float:
    """Of a GPU, or a process's share of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 / devices


def _yaml(profile: Hardware) -> str:
    stream = StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    yaml.dump(_rounded(profile.model_dump(mode="json")), stream)
    return (
        "# Measured by megavideo calibrate; what the fields mean: megavideo/plan/hardware.py.\n"
        "# peak_tflops is the fastest product measured; network is a copy of node_link: edit it.\n"
        + (
            "# One process ran: node_link is assumed too.\n"
            if profile.devices_per_node == 1
            else ""
        )
        + stream.getvalue()
    )


def _rounded(value: Any) -> Any:
    """Four digits of every number."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _link(link: Link) -> str:
    rates = {
        "all-reduce": link,
        "all-gather": link.all_gather,
        "reduce-scatter": link.reduce_scatter,
    }
    return "; ".join(
        f"{name} {rate.latency_us:.0f} us, {rate.gb_per_s:.2f} GB/s"
        for name, rate in rates.items()
        if rate is not None
    )


def _summary(profile: Hardware) -> str:
    pointwise = ", ".join(f"{k} {v:.1f}" for k, v in profile.pointwise_gb_per_s.items())
    overhead = profile.overhead
    lines = [f"{profile.device}, {profile.devices_per_node} at once"]
    for precision, points in profile.gemm.items():
        slow, fast = (f(points, key=lambda point: point[3]) for f in (min, max))
        rates = f"{slow[3]:.4g} TFLOP/s {slow[:3]} to {fast[3]:.4g} {fast[:3]}"
        lines.append(f"products, {precision}     {rates}")
    lines += [
        f"attention          {profile.attention_tflops['forward']:.4g} TFLOP/s forward, "
        f"{profile.attention_tflops['backward']:.4g} backward ({profile.attention})",
        f"pointwise, GB/s    {pointwise}",
        f"program            block {overhead.layer_forward_ms:.2f} + "
        f"{overhead.layer_backward_ms:.2f} ms, micro-batch {overhead.micro_batch_ms:.2f} ms, "
        f"step {overhead.step_ms:.2f} ms",
        f"between processes  {_link(profile.node_link)}",
        f"disk               {profile.disk_gb_per_s:.2f} GB/s",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
