"""Steps measured in worlds that are started here: a case that fails leaves the others alone."""

import json
import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megavideo.benchmark.results import Row
from megavideo.benchmark.step import OURS, Window, build, made_up_batches, measure
from megavideo.config.schema import Config
from megavideo.engine.errors import RunFailed
from megavideo.engine.launch import run_world
from megavideo.engine.world import join_world
from megavideo.log import log, setup_logging


@dataclass(frozen=True)
class Case:
    """One world.

    Attributes:
        memory_gib: that a GPU, or a process on a CPU, may take; 0 for all there is.
    """

    name: str
    config: Config
    world_size: int
    memory_gib: float = 0.0


def measure_case(case: Case, window: Window, deadline_s: float) -> Row:
    """The row of `case`, or one with the `reason` why there is none."""
    label = {"contender": OURS, "layout": case.name, "micro_batch": case.config.recipe.micro_batch}
    with tempfile.TemporaryDirectory() as name:
        try:
            run_world(_measure, case.world_size, case, window, Path(name), deadline_s=deadline_s)
            row: Row = json.loads((Path(name) / "row.json").read_text())
        except (RunFailed, ValueError) as error:
            log.warning("%s, micro-batch %d failed", case.name, case.config.recipe.micro_batch)
            return {**label, "reason": _last_line(str(error))}
    return row | label


def _measure(rank: int, case: Case, window: Window, folder: Path) -> None:
    setup_logging(logging.ERROR)
    if case.memory_gib:
        _limit_memory(case.memory_gib)
    world = join_world(timeout_minutes=30.0, parallel=case.config.parallel)
    engine = build(case.config, world, "made-up data")
    (row,) = measure(case.config, engine, made_up_batches(case.config, world), window)
    if rank == 0:
        (folder / "row.json").write_text(json.dumps(row))


def _limit_memory(gib: float) -> None:
    """More than this cannot be allocated: torch raises then."""
    size = int(gib * 2**30)
    if torch.cuda.is_available():
        share = size / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
        return
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _last_line(text: str) -> str:
    """Of a traceback: what was raised."""
    return next(line for line in reversed(text.splitlines()) if line.strip())[:300]
