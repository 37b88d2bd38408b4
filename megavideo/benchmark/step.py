"""How long a training step takes in this layout, and where the time goes.

The length of a step is measured without any timer inside it; the split comes from further steps in
which every phase is awaited (engine/phases.py), and says shares.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import torch

from megavideo.benchmark.harness import environment, measure_ceilings
from megavideo.benchmark.published import published
from megavideo.config.deepspeed import accumulation_steps
from megavideo.config.layout_names import layout_name
from megavideo.config.schema import Config
from megavideo.data.batch import Batch
from megavideo.engine.build import build_engine
from megavideo.engine.engine import Engine
from megavideo.engine.phases import Phases
from megavideo.engine.quiet import deepspeed
from megavideo.engine.world import World
from megavideo.log import log
from megavideo.model.build import stage_grid
from megavideo.model.flops import training_flops
from megavideo.model.layers import eager
from megavideo.model.partition import ideal_bubble
from megavideo.model.published_flops import published_work
from megavideo.train.speed import Speed, peak_memory_gib, peak_tflops
from megavideo.verify.made_up import micro_batches

OURS, EAGER, PUBLISHED = "megavideo", "eager", "published"
PHASES = ("data", "forward", "backward", "reduction", "optimizer", "pipeline", "other")
Row = dict[str, Any]


@dataclass(frozen=True)
class Window:
    """How many steps are made: unmeasured, measured, and with phases timed."""

    warmup: int
    steps: int
    split: int


@dataclass(frozen=True)
class Peak:
    """TFLOP/s that one device could do, and where the figure comes from."""

    tflops: float
    source: str

    @classmethod
    def find(cls, config: Config, world: World) -> "Peak":
        """Where nobody knows it, it is measured: a matrix product on all ranks at once."""
        known = peak_tflops(config)
        if known:
            return cls(known, "run.peak_tflops" if config.run.peak_tflops else "its data sheet")
        reached = measure_ceilings(world.device, rounds=3).flops_per_second / 1e12
        return cls(mean(world.gathered(reached)), "a matrix product measured on all ranks at once")


class Steps:
    """Training steps of one engine: ours, with nothing compiled, or as published."""

    def __init__(self, engine: Engine, batches: Iterator[Batch]):
        self.engine = engine
        self.batches = batches
        self.skipped = 0
        self.processor_s = 0.0

    def __call__(self, contender: str) -> float:
        """Make one step; its seconds on this rank, to the end of the device's work.

        `processor_s` then has the processor's seconds of it, in which other programs do not count.
        """
        with self._as(contender):
            started, processor = time.perf_counter(), time.process_time()
            self.skipped += self.engine.train_batch(self.batches).skipped
            if self.engine.world.device.type == "cuda":
                torch.cuda.synchronize()
            self.processor_s = time.process_time() - processor
            return time.perf_counter() - started

    def _as(self, contender: str) -> AbstractContextManager[None]:
        if contender == OURS:
            return nullcontext()
        return (published if contender == PUBLISHED else eager)(self.engine.module)


def made_up_batches(config: Config, world: World) -> Iterator[Batch]:
    """One step's micro-batches of this replica, again and again: drawing them costs nothing."""
    replica, recipe = world.mesh.dp, config.recipe
    frames = stage_grid(config.model, recipe.stage).frames
    drawn = micro_batches(config.model, frames, recipe.micro_batch, replica.rank, replica.size)
    return itertools.cycle(itertools.islice(drawn, accumulation_steps(recipe, replica.size)))


def build(config: Config, world: World, data: str) -> Engine:
    """An engine that will save nothing."""
    return build_engine(config, world, data, keep_base=False)


def measure(
    config: Config,
    engine: Engine,
    batches: Iterator[Batch],
    window: Window,
    against: Sequence[str] = (),
) -> list[Row]:
    """A row for each contender: ours, and those `against` which it is measured.

    Their steps alternate, on one engine, so that what changes with time changes for both. All ranks
    must call it; each gets all rows.
    """
    names = [OURS, *dict.fromkeys(against)]
    steps = Steps(engine, batches)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    processor: dict[str, list[float]] = {name: [] for name in names}
    memory = dict.fromkeys(names, 0.0)
    for number in range(window.warmup + window.steps):
        for name in names:
            _forget_peak()
            taken = steps(name)
            memory[name] = max(memory[name], peak_memory_gib())
            if number >= window.warmup:
                seconds[name].append(taken)
                processor[name].append(steps.processor_s)
    splits = _split(steps, names, window.split)
    peak = Peak.find(config, engine.world)
    return [
        row(
            as_run(config, name),
            engine.world,
            name,
            peak,
            seconds[name],
            memory[name],
            splits[name],
        )
        | {"skipped": steps.skipped, "processor_s": busiest(engine.world, processor[name])}
        for name in names
    ]


def as_run(config: Config, contender: str) -> Config:
    """What `contender` runs: only ours is ever compiled."""
    if contender == OURS:
        return config
    parallel = config.parallel.model_copy(update={"compile": False})
    return config.model_copy(update={"parallel": parallel})


def busiest(world: World, seconds: list[float]) -> float:
    """The largest over ranks of the median."""
    return max(world.gathered(median(seconds)))


def _forget_peak() -> None:
    """On a CPU the peak is the process's, for good: contenders share it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _split(steps: Steps, names: list[str], count: int) -> dict[str, dict[str, float]]:
    """Mean seconds of each phase of a step, this rank's."""
    phases = Phases(steps.engine.world.device)
    steps.engine.time_phases(phases)
    steps.batches = _timed(phases, steps.batches)
    split = {}
    for name in names:
        phases.seconds.clear()
        whole = sum(steps(name) for _ in range(count))
        parts = {phase: phases.seconds[phase] / count for phase in PHASES if phase != "other"}
        split[name] = parts | {"other": whole / count - sum(parts.values())}
    return split


def _timed(phases: Phases, batches: Iterator[Batch]) -> Iterator[Batch]:
    while True:
        with phases("data"):
            batch = next(batches)
        yield batch


def row(
    config: Config,
    world: World,
    contender: str,
    peak: Peak,
    seconds: list[float],
    memory_gib: float,
    split: dict[str, float],
) -> Row:
    """What was measured, gathered from all ranks, with everything that it must be read with."""
    tenths = [quantiles(seconds, n=10, method="inclusive")[i] for i in (1, 4, 7)]
    splits = world.gathered(split)
    layout, recipe = config.parallel, config.recipe
    micro_batches = accumulation_steps(recipe, world.mesh.dp.size)
    settings = config.model_dump(mode="json")
    return {
        "contender": contender,
        "layout": layout_name(layout, world.mesh.dp.size),
        "processes": world.size,
        "micro_batch": recipe.micro_batch,
        "micro_batches": micro_batches,
        "step_s": dict(zip(("p20", "p50", "p80"), tenths, strict=True)),
        "steps": len(seconds),
        **speeds(config, world, contender, peak, tenths[1]),
        "memory_gib": world.gathered(memory_gib),
        "split_s": {phase: mean(s[phase] for s in splits) for phase in PHASES},
        "split_of_ranks_s": splits,
        **({"ideal_bubble": ideal_bubble(layout, micro_batches)} if layout.pp > 1 else {}),
        "skew": _skew(splits),
        "rank_p50_s": world.gathered(tenths[1]),
        **_context(world),
        "config": {name: settings[name] for name in ("model", "recipe", "parallel")},
    }


def speeds(config: Config, world: World, contender: str, peak: Peak, seconds: float) -> Row:
    """Samples, tokens and useful FLOPs a second; utilisations of the peak, and which that is."""
    run = config.run.model_copy(update={"peak_tflops": peak.tflops})
    known = config.model_copy(update={"run": run})
    figures = Speed(known, world.size).figures(config.recipe.batch, seconds)
    if contender == PUBLISHED:
        useful = training_flops(config.model, config.recipe)
        figures["hfu"] = figures["mfu"] * published_flops(config) / useful
    return {**figures, "peak_from": peak.source}


def published_flops(config: Config) -> int:
    """That the published step executes for a sample, recomputation included."""
    work = published_work(config.model, config.recipe, config.parallel.recompute)
    return sum(part.total + part.again for part in work)


def _skew(splits: list[dict[str, float]]) -> Row:
    """Which rank computes longest, and by how much it exceeds the mean."""
    busy = [split["forward"] + split["backward"] for split in splits]
    slowest = max(range(len(busy)), key=lambda rank: busy[rank])
    return {"slowest_rank": slowest, "slowest_over_mean": busy[slowest] / mean(busy)}


def _context(world: World) -> Row:
    return {
        **environment(world.device),
        "deepspeed": deepspeed.__version__,
        "threads": torch.get_num_threads(),
    }


def trace(steps: Steps, path: Path) -> None:
    """Write what torch's profiler sees of one step, for chrome://tracing or Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        steps(OURS)
    profiler.export_chrome_trace(str(path))
    log.info("wrote %s", path)


def snapshot_memory(steps: Steps, path: Path) -> None:
    """Write every allocation of one step on this GPU, for pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)
    steps(OURS)
    torch.cuda.memory._dump_snapshot(str(path))
    torch.cuda.memory._record_memory_history(enabled=None)
    log.info("wrote %s", path)
