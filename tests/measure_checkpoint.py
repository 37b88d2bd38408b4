"""What loading and saving a checkpoint cost here, and which of two ways to load is the faster.

    python -m tests.measure_checkpoint --megabytes 600 --ranks 4

Loading: every rank reads its own slices, against rank 0 reading whole tensors and sending each rank
its slice. Files are cut for two ranks, so both must join and cut. Cold: the files were dropped from
the page cache. Saving: seconds that training stands still, and seconds of writing beside it.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import torch
import torch.distributed as dist

from megavideo.benchmark.checkpoint_command import drop_from_cache, save_once
from megavideo.checkpoint.commit import list_checkpoints
from megavideo.checkpoint.formats.interface import shard_for
from megavideo.checkpoint.manifest import MANIFEST, Progress, Training
from megavideo.checkpoint.parts import Parts, open_parts
from megavideo.config.schema import Config
from megavideo.engine.base import store_base
from megavideo.engine.build import build_engine
from megavideo.engine.engine import Engine
from megavideo.engine.part_plan import frozen_tensors
from megavideo.engine.snapshot import Saver
from megavideo.engine.world import join_world
from megavideo.parallel.shard import cut, part_shape
from tests.engine.support import FINGERPRINT, MODEL, config
from tests.unit.checkpoint.samples import write_checkpoint
from tests.world import run_world

HIDDEN, MIB = 1024, 1 << 20


@click.command()
@click.option("--megabytes", default=600, show_default=True, help="Size of the checkpoint.")
@click.option("--ranks", default=4, show_default=True)
def main(megabytes: int, ranks: int) -> None:
    """Print seconds, best of three."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        size = write_sample(folder / "run", megabytes)
        run_world(measure_loading, ranks, folder, deadline_s=600)
        for way, seconds in json.loads((folder / "loading.json").read_text()).items():
            print(f"load {size / MIB:.0f} MiB on {ranks} ranks, {way}: {seconds:.2f} s")
        run_world(measure_saving, 1, folder, deadline_s=600)
        for way, text in json.loads((folder / "saving.json").read_text()).items():
            print(f"{way}: {text}")


def write_sample(run: Path, megabytes: int) -> int:
    """A checkpoint of temporal channels and moments of about this size; its bytes."""
    layers = max(1, megabytes * MIB // (4 * 4 * HIDDEN * HIDDEN * 3))
    shapes = {"qkv.weight": (3 * HIDDEN, HIDDEN), "dense.weight": (HIDDEN, HIDDEN)}
    tensors = {
        f"layers.{layer}.attention.temporal.{name}{kind}": torch.randn(shape)
        for layer in range(layers)
        for name, shape in shapes.items()
        for kind in ("", ".exp_avg", ".exp_avg_sq")
    }
    training = Training(Progress(1, 1, 1), {"recipe": {"stage": "keyframes"}}, "", None, None)
    write_checkpoint(run, tensors, training, tp=2)
    return sum(tensor.nbytes for tensor in tensors.values())


def measure_loading(rank: int, folder: Path) -> None:
    """Both ways, cold and warm; rank 0 writes the best times."""
    checkpoint = list_checkpoints(folder / "run")[0]
    times = {}
    for way, load in (("all read their slices", own_slices), ("rank 0 sends", from_first)):
        for state in ("cold", "warm"):
            seconds = [timed(load, checkpoint, state == "cold") for _ in range(3)]
            times[f"{way}, {state}"] = min(seconds)
    if rank == 0:
        (folder / "loading.json").write_text(json.dumps(times))


def timed(load: Callable[[Parts], None], checkpoint: Path, cold: bool) -> float:
    if cold and dist.get_rank() == 0:
        drop_from_cache(checkpoint.iterdir())
    dist.barrier()
    started = time.perf_counter()
    load(open_parts(checkpoint / MANIFEST))
    dist.barrier()
    return time.perf_counter() - started


def own_slices(parts: Parts) -> None:
    for name in parts.tensors:
        parts.read_part(name, dist.get_rank(), dist.get_world_size())


def from_first(parts: Parts) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for name, spec in parts.tensors.items():
        shard = shard_for(name)
        mine = torch.empty(part_shape(spec.shape, shard, rank, size), dtype=spec.dtype)
        slices = None
        if rank == 0:
            whole = parts.read(name)
            slices = [cut(whole, shard, r, size).contiguous() for r in range(size)]
        dist.scatter(mine, slices, src=0)


def measure_saving(rank: int, folder: Path) -> None:
    """A run of this size: what stands still, what is written beside, memory."""
    layers = 12
    model = MODEL.model_copy(update={"hidden": HIDDEN, "heads": 8, "layers": layers})
    settings = config(folder / "saved").model_copy(update={"model": model})
    engine = build_engine(settings, join_world(1.0), FINGERPRINT)
    told = {"store the base": measure_base(engine, settings, folder / "again")}
    saver = Saver(engine, settings, FINGERPRINT)
    before = peak_from_here()
    for number in range(3):
        engine.progress = replace(engine.progress, step=number)
        saved = save_once(saver)
        size = sum(spec.nbytes for spec in saver._tensors.values()) / MIB
        told[f"save {number + 1} of {size:.0f} MiB"] = (
            f"{saved.stall_s:.3f} s of training lost, {saved.write_s:.2f} s of writing beside it"
        )
    told["memory of the three saves"] = f"{memory('VmHWM') - before:.0f} MiB"
    (folder / "saving.json").write_text(json.dumps(told))


def measure_base(engine: Engine, settings: Config, run: Path) -> str:
    """Seconds and memory for storing the frozen weights in a folder that lacks them."""
    tensors = frozen_tensors(settings, torch.float32)
    before, started = peak_from_here(), time.perf_counter()
    store_base(engine.frozen, tensors, run)
    size = sum(spec.nbytes for spec in tensors.values()) / MIB
    largest = max(spec.nbytes for spec in tensors.values()) / MIB
    return (
        f"{size:.0f} MiB in {time.perf_counter() - started:.2f} s, with "
        f"{memory('VmHWM') - before:.0f} MiB of memory; the largest tensor has {largest:.0f} MiB"
    )


def peak_from_here() -> float:
    """Forget the peak of this process's memory; MiB that it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(field: str) -> float:
    """MiB of this process, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
