"""Saving a run: a copy to host memory, then files written by all ranks, then the commit.

    save()    training stands still: frozen weights are checked, and every rank copies the parts
              that it will write into host memory
    thread    writes, hashes and fsyncs this rank's files; it knows no other rank
    poll()    between two steps: once all ranks have written, rank 0 writes the manifest, renames
              the folder into place and lets `latest` name it

Ranks agree in `poll` by ordinary collectives of the main thread, so nothing runs beside training's
own. A kill before the commit leaves a temporary folder that the next save sweeps away.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megavideo.checkpoint.commit import abandon, begin, commit, prune, temporary
from megavideo.checkpoint.manifest import Manifest, Training
from megavideo.checkpoint.part_file import write_part_file
from megavideo.checkpoint.tensor_stream import file_order
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.schema import Config
from megavideo.engine.engine import Engine
from megavideo.engine.part_plan import planned_files, trained_tensors, without_padding
from megavideo.files import fsync_dir
from megavideo.log import log

# What DeepSpeed's dynamic loss scaler changes while it runs.
LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


# Seals of the files that a rank wrote, and the seconds that it took.
Written = tuple[dict[str, str], float]


@dataclass(frozen=True)
class Saved:
    """How a save ended; all ranks agree.

    Attributes:
        stall_s: seconds that training stood still for it on this rank.
        write_s: seconds that writing took on the slowest rank.
        problem: why there is no such checkpoint; None if it was committed.
    """

    step: int
    stall_s: float
    write_s: float
    problem: str | None = None


@dataclass
class _Pending:
    """A save between its copy and its commit."""

    training: Training
    written: Future[Written]
    stall_s: float


class Saver:
    """Saves checkpoints of `engine` into the run's folder. All ranks make every call alike.

    Args:
        data: fingerprint of the training data.
        tokenizers: that made it; None if it was made up.
    """

    def __init__(
        self, engine: Engine, config: Config, data: str, tokenizers: TokenizerDigests | None = None
    ):
        self._engine = engine
        self._world = engine.world
        self._config = config
        self._data = data
        self._tokenizers = tokenizers
        self._run = Path(config.run.directory)
        self._tensors = trained_tensors(config)
        self._files = list(planned_files(self._tensors, engine.state.names, self._world.mesh))
        self._host: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._pending: _Pending | None = None

    def save(self) -> None:
        """Start a save of the engine as it is now, the one before being finished.

        Raises:
            RunFailed: if a frozen weight changed; then nothing is written.
        """
        assert self._pending is None, "one save at a time"
        started = time.perf_counter()
        self._engine.frozen.check()
        step = self._engine.progress.step
        written = self._begin(step) or self._thread.submit(
            _write, temporary(self._run, step), self._copy()
        )
        self._pending = _Pending(self._training(), written, time.perf_counter() - started)

    def poll(self) -> Saved | None:
        """Commit the save that is on its way if all ranks have written it, else None."""
        if self._pending is None or self._world.any(not self._pending.written.done()):
            return None
        return self.finish()

    def finish(self) -> Saved | None:
        """Wait for the save that is on its way, if any, and commit it."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        started = time.perf_counter()
        mine = _outcome(pending.written)
        problem, seals, write_s = _together(self._world.gathered(mine))
        step = pending.training.progress.step
        if problem is None:
            manifest = Manifest(
                self._world.mesh.tp.size, self._tensors, seals, training=pending.training
            )
            problem = self._on_rank_zero(lambda: commit(self._run, step, manifest))
        if problem is None:
            self._on_rank_zero(self._prune)
        else:
            self._on_rank_zero(lambda: abandon(self._run, step))
        stall_s = pending.stall_s + time.perf_counter() - started
        return Saved(step, stall_s, write_s, problem)

    def _begin(self, step: int) -> Future[Written] | None:
        """Make the folder to write into; a write that has failed if there can be none."""
        problem = self._on_rank_zero(lambda: begin(self._run, step))
        if problem is None:
            return None
        failed: Future[Written] = Future()
        failed.set_exception(OSError(problem))
        return failed

    def _copy(self) -> dict[str, dict[str, Tensor]]:
        """This rank's files in host memory. Replicas bring the fragments that they hold."""
        files: dict[str, dict[str, Tensor]] = {}
        for file in self._files:
            for name in file_order(file.parts):
                part = self._engine.state.part(name, file.owner)
                if part is not None:
                    real = without_padding(part, file.parts[name].shape)
                    files.setdefault(file.name, {})[name] = self._to_host(name, real)
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        return files

    def _to_host(self, name: str, part: Tensor) -> Tensor:
        """A copy that training does not touch, in memory that every save uses again."""
        if name not in self._host:
            pinned = self._world.device.type == "cuda"
            self._host[name] = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned)
        return self._host[name].copy_(part, non_blocking=True)

    def _training(self) -> Training:
        engine = self._engine
        scaler = engine.loss_scaler and {n: getattr(engine.loss_scaler, n) for n in LOSS_SCALER}
        config = self._config.model_dump(mode="json")
        base = engine.frozen.digest
        return Training(engine.progress, config, self._data, base, scaler, self._tokenizers)

    def _prune(self) -> None:
        settings = self._config.run
        try:
            prune(self._run, settings.keep_last, settings.keep_every)
        except OSError as error:  # the new checkpoint is there all the same
            log.warning("old checkpoints were not removed: %s", error)

    def _on_rank_zero(self, function: Callable[[], object]) -> str | None:
        """What went wrong, told to all ranks."""
        return self._world.problem(lambda: function() if self._world.rank == 0 else None)


def _write(folder: Path, files: dict[str, dict[str, Tensor]]) -> Written:
    """Write this rank's files, durably; their seals and the seconds that it took."""
    started = time.perf_counter()
    seals = {name: write_part_file(folder / name, parts) for name, parts in files.items()}
    fsync_dir(folder)
    return seals, time.perf_counter() - started


def _outcome(written: Future[Written]) -> tuple[str | None, Written]:
    """Wait; what went wrong, and what was written."""
    try:
        return None, written.result()
    except OSError as error:
        return str(error), ({}, 0.0)


def _together(
    outcomes: list[tuple[str | None, Written]],
) -> tuple[str | None, dict[str, str], float]:
    """All ranks' outcomes as one: the first problem, all seals, the longest time."""
    problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text]
    seals = {name: seal for _, (some, _) in outcomes for name, seal in some.items()}
    return next(iter(problems), None), seals, max(seconds for _, (_, seconds) in outcomes)
