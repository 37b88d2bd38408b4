"""How fast `megavideo convert` is, and how much memory it takes: a program, no test.

    python tests/measure_convert.py FOLDER --layers 4

It makes a checkpoint of the published model's shapes with fewer layers and converts it through the
formats one after another, each time in a fresh process, in turn with copying the result by `cp`
and `sync`. What is read is in the page cache for both; what is written must reach the disk for
both. Seconds are medians; what Python and torch take to start is not in them. Where other programs
run, seconds of processor time say more than those by the clock.
"""

import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import click
import torch
from click.testing import CliRunner
from torch import Tensor

from megavideo.checkpoint.convert import Conversion, convert
from megavideo.checkpoint.convert_command import main as convert_command
from megavideo.checkpoint.describe import differences
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.interface import MOMENTS, Reader, check_whole
from megavideo.checkpoint.formats.sharded import ShardedWriter
from megavideo.checkpoint.manifest import Progress, Training
from megavideo.checkpoint.tensor_stream import BLOCK, TensorSpec, steps
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.model.table import parameter_table

# From, to, options: each starts where an earlier one has ended, at last where all began.
ROUTES = (
    ("source", "megavideo", ["--to", "megavideo", "--tp", "4"]),
    ("megavideo", "megatron", ["--to", "megatron", "--tp", "4", "--pp", "2"]),
    ("megatron", "universal", ["--to", "universal"]),
    ("universal", "whole", ["--to", "megavideo"]),
    ("source", "sat", ["--to", "sat", "--tp", "2", "--dtype", "fp16"]),
    ("sat", "huggingface", ["--to", "huggingface", "--max-file-size", "2GB"]),
)


@dataclass(frozen=True)
class Row:
    """One conversion.

    Attributes:
        read, written: bytes of source and destination.
        seconds: of the conversion, until everything is on the disk.
        cp_seconds: of copying the destination's files with cp and sync.
        cpu, cp_cpu: seconds of processor time of both, which other programs do not change much.
        peak: the process's peak memory beyond what it had before it began, in bytes, the highest.
        largest: bytes of the largest tensor.
    """

    route: str
    read: int
    written: int
    seconds: float
    cp_seconds: float
    cpu: float
    cp_cpu: float
    peak: int
    largest: int

    def __str__(self) -> str:
        return (
            f"{self.route:<30}{self.read / 1e9:>8.2f}{self.written / 1e9:>9.2f}"
            f"{self.seconds:>9.2f}{self.cp_seconds:>8.2f}{self.seconds / self.cp_seconds:>7.2f}"
            f"{self.cpu:>8.2f}{self.cp_cpu:>8.2f}"
            f"{self.peak / 1e6:>9.0f}{self.peak / self.largest:>12.2f}"
        )


HEADER = (
    f"{'conversion':<30}{'read GB':>8}{'wrote GB':>9}{'s':>9}{'cp s':>8}{'x cp':>7}"
    f"{'CPU s':>8}{'cp CPU':>8}"
    f"{'peak MB':>9}{'x largest':>12}"
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=4, show_default=True, help="Layers of the synthetic model.")
@click.option("--hidden", default=3072, show_default=True, help="Its width.")
@click.option("--words", default=150_010, show_default=True, help="Rows of its word table.")
@click.option("--repeat", default=3, show_default=True, help="Times that each is measured.")
def main(folder: Path, layers: int, hidden: int, words: int, repeat: int) -> None:
    """Print a row a conversion. FOLDER must not exist; it is removed at the end."""
    folder.mkdir(parents=True)
    try:
        make_source(folder / "source", layers, hidden, words)
        click.echo(HEADER)
        for source, target, options in ROUTES:
            click.echo(str(measure(folder, source, target, options, repeat)))
            if source != "source":
                shutil.rmtree(folder / source)
        problems = list(differences(*map(open_checkpoint, (folder / "source", folder / "whole"))))
        assert not problems, problems
        click.echo("what came back through all formats equals what went in, bit for bit")
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, source: str, target: str, options: list[str], repeat: int) -> Row:
    """Convert folder/source into folder/target and copy the result, in turn."""
    largest = max(spec.nbytes for spec in open_checkpoint(folder / source).tensors.values())
    arguments = [str(folder / source), str(folder / target), *options]
    converted, copied = [], []
    for _ in range(repeat):
        shutil.rmtree(folder / target, ignore_errors=True)
        _read_once(folder / source)
        os.sync()
        converted.append(_in_a_process(arguments))
        copied.append(_copy(folder / target, folder / "copy"))
    return Row(
        f"{source} -> {target} {' '.join(options[2:])}",
        _size(folder / source),
        _size(folder / target),
        median(cost.seconds for cost in converted),
        median(cost.seconds for cost in copied),
        median(cost.cpu for cost in converted),
        median(cost.cpu for cost in copied),
        max(cost.peak for cost in converted),
        largest,
    )


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock, seconds of processor time, and peak memory in bytes."""

    seconds: float
    cpu: float
    peak: int = 0


def _in_a_process(arguments: list[str]) -> Cost:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_convert, args=(arguments, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def make_source(folder: Path, layers: int, hidden: int, words: int) -> None:
    """Weights and optimizer state as a run of stage keyframes has them, in half precision."""
    model = ModelConfig(
        hidden=hidden, heads=48, layers=layers, vocab_size=words, begin_of_image=words - 10
    )
    reader = Noise(model)
    config = {"recipe": {"stage": "keyframes"}, "model": model.model_dump(mode="json")}
    training = Training(Progress(20, 20, 160), config, "data", "base", None)
    writer = ShardedWriter(1, training)
    convert(Conversion(reader, writer, folder, reader.tensors), verify=False)


class Noise(Reader):
    """A checkpoint whose every tensor is made of the same random bytes."""

    format = "noise"
    path = Path("/")

    def __init__(self, model: ModelConfig):
        self.files = []
        self.tensors = {}
        for row in parameter_table(model, RecipeConfig(stage="keyframes", steps=1)):
            dtype = torch.float32 if row.trainable else torch.float16
            self.tensors[row.name] = TensorSpec(dtype, row.shape)
            if row.trainable:
                for moment in MOMENTS:
                    self.tensors[row.name + moment] = TensorSpec(dtype, row.shape)
        largest = max(spec.row_bytes for spec in self.tensors.values())
        self._bytes = torch.randint(0, 60, (max(2 * BLOCK, largest),), dtype=torch.uint8)

    def blocks(self, name: str) -> Iterator[Tensor]:
        spec = self.tensors[name]
        for rows in steps(spec.shape[0], spec.row_bytes):
            block = self._bytes[: rows * spec.row_bytes].view(spec.dtype)
            yield block.view(rows, *spec.shape[1:])


def _convert(arguments: list[str], sender: Connection) -> None:
    """In a fresh process: what it costs beyond the imports."""
    check_whole(
        open_checkpoint(Path(arguments[0]))
    )  # torch loads much of itself for its first model
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    start, cpu = time.perf_counter(), time.process_time()
    CliRunner().invoke(convert_command, arguments, catch_exceptions=False)
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    sender.send(Cost(seconds, used, _memory("VmHWM") - before))


def _copy(source: Path, target: Path) -> Cost:
    os.sync()
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "-r", source, target], check=True)
    # By name: a bare sync leaves the work to the kernel's threads, whose time nobody pays for.
    subprocess.run(["sync", *filter(Path.is_file, target.rglob("*"))], check=True)
    seconds, after = time.perf_counter() - start, os.times()
    shutil.rmtree(target)
    cpu = after.children_user + after.children_system
    return Cost(seconds, cpu - before.children_user - before.children_system)


def _memory(field: str) -> int:
    """Bytes of this process, as the kernel counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _read_once(folder: Path) -> None:
    """Bring a folder's files into the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


if __name__ == "__main__":
    main()
