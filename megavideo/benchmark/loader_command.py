"""`megavideo benchmark loader`: samples a second of the real data stream, by reading threads."""

import time
from contextlib import closing
from pathlib import Path
from statistics import quantiles

import click
import torch

from megavideo import options
from megavideo.benchmark.harness import environment
from megavideo.benchmark.results import Row, bars, conditions, table, write_results
from megavideo.benchmark.step_command import ALWAYS
from megavideo.config.command import config_arguments
from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.data.batch import open_stream
from megavideo.log import progress

COLUMNS = ["threads", "samples/s", "tokens/s", "wait for a micro-batch, ms (p20-p80)"]


@click.command()
@config_arguments
@options.results_folder
@click.option(
    "--threads", default="1 2 4", show_default=True, help="Numbers of reading threads to measure."
)
@click.option(
    "--samples", default=512, show_default=True, type=click.IntRange(2), help="Read for each."
)
def main(
    files: tuple[str, ...],
    assignments: tuple[str, ...],
    output: Path,
    threads: str,
    samples: int,
) -> None:
    """Measure how fast one rank reads training samples: shards to batches, nothing trained.

    The first micro-batches, which wait for what is read ahead, do not count. Files may come from
    the page cache: the first number of threads warms it for the others. Writes loader.json,
    loader.md and loader.png.

    \b
    Example, after `make demo`:
      megavideo benchmark loader configs/model/demo.yaml configs/recipe/demo-stage1.yaml \\
          configs/data/demo.yaml --output runs/benchmark
    """
    config = load_config(files, [*assignments, *ALWAYS])
    numbers = [int(word) for word in threads.split() if word.isdecimal() and int(word)]
    if len(numbers) != len(threads.split()) or not numbers:
        raise ValueError(f"--threads {threads!r}: give numbers of at least 1, as '1 2 4'")
    rows = []
    with progress("measuring the loader", len(numbers)) as advance:
        for number in numbers:
            rows.append(measure(config, number, samples))
            advance(note=f"{number} threads")
    text = _page(rows)
    names, rates = [f"{row['threads']} threads" for row in rows], [r["samples_per_s"] for r in rows]
    figure = bars(names, {"samples": rates}, "samples a second", "Data stream of one rank")
    write_results(output, "loader", rows, text, figure)
    click.echo(text, nl=False)


def measure(config: Config, threads: int, samples: int) -> Row:
    """Read `samples` samples, after those that are read ahead, with so many threads."""
    data, recipe = config.data.model_copy(update={"threads": threads}), config.recipe
    stream = open_stream(data, config.model, recipe, data.train)
    ahead = -(-data.prefetch // recipe.micro_batch)
    waits = []
    with closing(stream.micro_batches(0, 0, 1)) as batches:  # type: ignore[type-var]
        for _ in range(ahead + 1):
            next(batches)
        started = time.perf_counter()
        for _ in range(max(2, samples // recipe.micro_batch)):
            before = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - before)
        seconds = time.perf_counter() - started
    rate = len(waits) * recipe.micro_batch / seconds
    tenths = quantiles(waits, n=10, method="inclusive")
    return {
        "subject": "loader",
        "threads": threads,
        "samples_per_s": rate,
        "tokens_per_s": rate * config.model.grid.sequence,
        "wait_s": {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7]},
        "bad_samples": stream.bad_samples,
        "cut_texts": stream.cut_texts,
        "data": data.train,
        **environment(torch.device("cpu")),
        "config": config.model_dump(mode="json", include={"model", "recipe", "data"}),
    }


def _page(rows: list[Row]) -> str:
    lines = [
        [
            str(row["threads"]),
            f"{row['samples_per_s']:,.1f}",
            f"{row['tokens_per_s']:,.0f}",
            "{p50:.3g} ({p20:.3g}-{p80:.3g})".format(
                **{k: 1e3 * v for k, v in row["wait_s"].items()}
            ),
        ]
        for row in rows
    ]
    return f"# Loader\n\n{conditions(rows[0])}\n\n{table(COLUMNS, lines)}\n"
