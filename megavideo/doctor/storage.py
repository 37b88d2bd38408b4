"""The run's folder: seen by every node, fast enough, and large enough for the checkpoints."""

import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megavideo.config.schema import Config
from megavideo.doctor.facts import GIB
from megavideo.doctor.verdict import Verdict, listed
from megavideo.engine.weights import DTYPES, new_model
from megavideo.model.build import canonical_parameters

PROBE_CHUNKS, CHUNK_BYTES = 128, 2**20
PROBE_SECONDS = 10.0  # a slow file system must not keep the other ranks waiting
SLOW_BYTES_PER_S = 100e6
SLOW_FSYNC_S = 0.5
FSYNCS = 8


@dataclass(frozen=True)
class Rates:
    """How fast a folder takes a large file, fsync included, and how long a small fsync takes."""

    bytes_per_s: float
    fsync_s: float


def existing(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that is there."""
    folder = folder.absolute()
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def leave_mark(folder: Path) -> Path:
    """Write a file of a name that nobody can guess; the caller removes it."""
    mark = folder / f".megavideo-doctor-{secrets.token_hex(8)}"
    mark.touch()
    return mark


def measure(folder: Path) -> Rates:
    """Write and fsync in `folder`; nothing is left there."""
    probe = leave_mark(folder)
    try:
        with open(probe, "wb", buffering=0) as file:
            rate = _write_rate(file.fileno())
            return Rates(rate, _fsync_seconds(file.fileno()))
    finally:
        probe.unlink()


def _write_rate(descriptor: int) -> float:
    chunk = os.urandom(CHUNK_BYTES)  # a file system that compresses gains nothing
    started = time.perf_counter()
    written = 0
    while written < PROBE_CHUNKS * CHUNK_BYTES and time.perf_counter() - started < PROBE_SECONDS:
        written += os.write(descriptor, chunk)
    os.fsync(descriptor)
    return written / (time.perf_counter() - started)


def _fsync_seconds(descriptor: int) -> float:
    started = time.perf_counter()
    for _ in range(FSYNCS):
        os.write(descriptor, b"x")
        os.fsync(descriptor)
    return (time.perf_counter() - started) / FSYNCS


def unusable(check: str, folder: Path, error: OSError) -> Verdict:
    """The folder cannot be written to, or has no room for a probe."""
    return Verdict("fail", check, f"cannot write to {folder} ({error}); choose another")


def judge_rates(folder: Path, rates: Rates, checkpoint: int | None) -> Verdict:
    """Rates in words; with a configuration also how long a checkpoint takes."""
    text = (
        f"{folder}: {rates.bytes_per_s / 1e6:,.0f} MB/s written, {rates.fsync_s * 1e3:.1f} ms an "
        "fsync"
    )
    if checkpoint:
        text += f"; a checkpoint takes {checkpoint / rates.bytes_per_s:,.0f} s"
    if rates.bytes_per_s < SLOW_BYTES_PER_S or rates.fsync_s > SLOW_FSYNC_S:
        return Verdict("warn", "storage", f"{text}: slow; choose another run.directory")
    return Verdict("ok", "storage", text)


def judge_shared(folder: Path, blind: list[str], num_nodes: int) -> Verdict:
    """Every node sees what the first one wrote, or which do not."""
    if blind:
        text = (
            f"{listed(blind)} cannot see what the first node wrote to {folder}: checkpoints are "
            "read by all; mount the same file system, or choose another run.directory"
        )
        return Verdict("fail", "shared folder", text)
    return Verdict("ok", "shared folder", f"{folder} is the same on {num_nodes} node(s)")


@dataclass(frozen=True)
class Sizes:
    """Bytes of a run's files: one checkpoint, and the frozen base that all refer to."""

    checkpoint: int
    base: int


def sizes(config: Config) -> Sizes:
    """What a run will write: float32 weights and moments, and the frozen base once."""
    parameters = canonical_parameters(new_model(config, torch.device("meta"))).values()
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    moments = 2 if config.recipe.optimizer.name == "adamw" else 0
    base = frozen * DTYPES[config.recipe.precision].itemsize
    return Sizes(4 * trained * (1 + moments), base)


def judge_space(folder: Path, config: Config) -> Verdict:
    """Room for the checkpoints that are kept, the one being written, and the base."""
    needed = sizes(config)
    total = needed.checkpoint * (config.run.keep_last + 1) + needed.base
    free = shutil.disk_usage(folder).free
    text = (
        f"{free / GIB:,.1f} GiB free, {total / GIB:,.1f} needed: {config.run.keep_last} + 1 "
        f"checkpoints of {needed.checkpoint / GIB:,.2f} and the base of {needed.base / GIB:,.2f}"
    )
    if free < total:
        return Verdict("fail", "disk space", f"{text}; make room, or lower run.keep_last")
    return Verdict("ok", "disk space", text)
