"""How fast `megavideo convert` is, and how much memory it takes: a program, no test.

    python tests/measure_convert.py FOLDER --layers 4

It makes a checkpoint of the published model's shapes with fewer layers, converts it through the
formats one after another, each in a fresh process, and copies the same bytes with `cp` and `sync`
beside it. What is read is in the page cache for both; what is written must reach the disk.
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

import click
import torch
from click.testing import CliRunner
from torch import Tensor

from megavideo.checkpoint.convert import Conversion, convert
from megavideo.checkpoint.convert_command import main as convert_command
from megavideo.checkpoint.formats.detect import open_checkpoint
from megavideo.checkpoint.formats.interface import MOMENTS, Reader
from megavideo.checkpoint.formats.sharded import ShardedWriter
from megavideo.checkpoint.manifest import Progress, Training
from megavideo.checkpoint.tensor_stream import BLOCK, TensorSpec, steps
from megavideo.config.schema import ModelConfig, RecipeConfig
from megavideo.model.table import parameter_table

# From, to, options: each starts where an earlier one has ended.
ROUTES = (
    ("source", "cut", ["--to", "megavideo", "--tp", "4"]),
    ("cut", "whole", ["--to", "megavideo"]),
    ("source", "sat", ["--to", "sat", "--tp", "2", "--dtype", "fp16"]),
    ("sat", "huggingface", ["--to", "huggingface", "--max-file-size", "2GB"]),
    ("huggingface", "back", ["--to", "megavideo", "--tp", "8"]),
)


@dataclass(frozen=True)
class Row:
    """One conversion.

    Attributes:
        read, written: bytes of source and destination.
        seconds: of the conversion, until everything is on the disk.
        cp_seconds: of copying the destination's files with cp and sync, the faster of two times.
        peak: the process's peak memory beyond what it had before it began, in bytes.
        largest: bytes of the largest tensor.
    """

    route: str
    read: int
    written: int
    seconds: float
    cp_seconds: float
    peak: int
    largest: int

    def __str__(self) -> str:
        return (
            f"{self.route:<30}{self.read / 1e9:>8.2f}{self.written / 1e9:>9.2f}"
            f"{self.seconds:>9.2f}{self.cp_seconds:>8.2f}{self.seconds / self.cp_seconds:>8.2f}"
            f"{self.peak / 1e6:>9.0f}{self.peak / self.largest:>12.2f}"
        )


HEADER = (
    f"{'conversion':<30}{'read GB':>8}{'wrote GB':>9}{'s':>9}{'cp s':>8}{'x cp':>8}"
    f"{'peak MB':>9}{'x largest':>12}"
)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=4, show_default=True, help="Layers of the synthetic model.")
@click.option("--hidden", default=3072, show_default=True, help="Its width.")
@click.option("--words", default=150_010, show_default=True, help="Rows of its word table.")
@click.option("--only", multiple=True, help="Measure only conversions to this name.")
def main(folder: Path, layers: int, hidden: int, words: int, only: tuple[str, ...]) -> None:
    """Print a row a conversion. FOLDER must not exist; it is removed at the end."""
    folder.mkdir(parents=True)
    try:
        make_source(folder / "source", layers, hidden, words)
        click.echo(HEADER)
        for source, target, options in ROUTES:
            row = measure(folder, source, target, options)
            if not only or target in only:
                click.echo(str(row))
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, source: str, target: str, options: list[str]) -> Row:
    """Convert folder/source into folder/target and copy the result."""
    largest = max(spec.nbytes for spec in open_checkpoint(folder / source).tensors.values())
    _read_once(folder / source)
    os.sync()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = [str(folder / source), str(folder / target), *options]
    process = context.Process(target=_convert, args=(arguments, sender))
    process.start()
    sender.close()
    seconds, peak = receiver.recv()
    process.join()
    return Row(
        f"{source} -> {target} {' '.join(options[2:])}",
        _size(folder / source),
        _size(folder / target),
        seconds,
        min(_copy(folder / target, folder / "copy") for _ in range(2)),
        peak,
        largest,
    )


def make_source(folder: Path, layers: int, hidden: int, words: int) -> None:
    """Weights and optimizer state as a run of stage keyframes has them, in half precision."""
    model = ModelConfig(
        hidden=hidden,
        heads=48,
        layers=layers,
        text_slots=64,
        frames=5,
        side=20,
        vocab_size=words,
        image_codes=20_000,
        pad=20_003,
        newline=20_004,
        begin_of_image=words - 10,
        position_rows=1024,
        image_position=512,
        frame_position_rows=2000,
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
        self._bytes = torch.randint(0, 60, (max(BLOCK, largest),), dtype=torch.uint8)

    def blocks(self, name: str) -> Iterator[Tensor]:
        spec = self.tensors[name]
        for rows in steps(spec.shape[0], spec.row_bytes):
            block = self._bytes[: rows * spec.row_bytes].view(spec.dtype)
            yield block.view(rows, *spec.shape[1:])


def _convert(arguments: list[str], sender: Connection) -> None:
    """In a fresh process: seconds, and peak memory beyond what the imports took."""
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    start = time.perf_counter()
    CliRunner().invoke(convert_command, arguments, catch_exceptions=False)
    sender.send((time.perf_counter() - start, _memory("VmHWM") - before))


def _copy(source: Path, target: Path) -> float:
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


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
