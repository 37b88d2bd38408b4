"""`megavideo analyze`: what the two channels of a trained model do (CogVideo, appendix A)."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from megavideo import options
from megavideo.analysis.mass import KINDS, MassRecorder
from megavideo.checkpoint.manifest import check_learned_from, read_training
from megavideo.checkpoint.sources import find_checkpoint
from megavideo.checkpoint.tokenizers import TokenizerDigests
from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.data.batch import Batch, BatchStream, open_stream
from megavideo.engine.weights import load_model
from megavideo.files import atomic_path, atomic_write
from megavideo.model.attention import DualAttention

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Row = dict[str, str | int | float]


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder for tables, pictures."
)
@click.option("--data", help="Shards to look at.  [default: the run's data.validation]")
@click.option(
    "--samples", type=click.IntRange(min=1), default=8, show_default=True,
    help="Clips that attention is read on.",
)  # fmt: skip
@options.cpu_or_cuda
def main(run: Path, output: Path, data: str | None, samples: int, device: str) -> None:
    """Plot how a text-to-video model of RUN uses its channels.

    Writes mixture.csv and mixture.png (the learned mixture of each layer: 1 is the frozen spatial
    channel alone, 0 the temporal one), attention.csv and attention.png (the temporal channel's mean
    attention on text, own frame, earlier and later frames, by layer and head).

    \b
    Example:
      megavideo analyze runs/stage1 --output runs/stage1/analysis
    """
    config = load_config([run / "config.yaml"])
    checkpoint = find_checkpoint(run)
    if checkpoint is None:
        raise FileNotFoundError(f"{run} holds no checkpoint")
    if read_training(checkpoint).stage == "image":
        raise ValueError(f"{run} is a text-to-image run: it has no temporal channel to look at")
    model = load_model(config, checkpoint, torch.device(device)).float()
    layers = [module for module in model.modules() if isinstance(module, DualAttention)]
    mixtures = mixture_rows(layers)
    stream = _open_stream(config, data)
    ours = TokenizerDigests.of(stream.making)
    check_learned_from(checkpoint, ours, "tokenise --data with that one")
    masses = mass_rows(model, layers, _batches(config, stream, samples), torch.device(device))
    _write_table(output / "mixture.csv", mixtures)
    _write_table(output / "attention.csv", masses)
    draw_mixture(mixtures, output / "mixture.png")
    draw_masses(masses, output / "attention.png")
    click.echo(f"wrote mixture and attention, .csv and .png, into {output}")


def mixture_rows(layers: Sequence[DualAttention]) -> list[Row]:
    """Mean and quantiles over hidden units of each layer's share of the spatial channel."""
    rows = []
    for index, attention in enumerate(layers):
        share = attention.mixture.detach().float().sigmoid().cpu()
        quantiles = torch.quantile(share, torch.tensor(QUANTILES)).tolist()
        row: Row = {"layer": index, "mean": float(share.mean())}
        rows.append(row | {f"q{q:.2f}": v for q, v in zip(QUANTILES, quantiles, strict=True)})
    return rows


@torch.no_grad()
def mass_rows(
    model: nn.Module,
    layers: Sequence[DualAttention],
    batches: Sequence[Batch],
    device: torch.device,
) -> list[Row]:
    """A row for each layer and head: mean attention mass on each kind of key."""
    recorders = [MassRecorder(layer.temporal.rule, layer.temporal.heads) for layer in layers]
    for layer, recorder in zip(layers, recorders, strict=True):
        layer.temporal.cache = recorder
    try:
        for batch in batches:
            model(tuple(x.to(device) for x in (batch.text, batch.text_length, batch.image)))
    finally:
        for layer in layers:
            layer.temporal.cache = None
    return [
        {"layer": index, "head": head, **dict(zip(KINDS, mass.tolist(), strict=True))}
        for index, recorder in enumerate(recorders)
        for head, mass in enumerate(recorder.mass)
    ]


def _open_stream(config: Config, data: str | None) -> BatchStream:
    folder = data or config.data.validation
    if folder is None:
        raise ValueError("the run has no data.validation: name shards to look at with --data")
    return open_stream(config.data, config.model, config.recipe, folder)


def _batches(config: Config, stream: BatchStream, samples: int) -> list[Batch]:
    micro_batch = min(samples, config.recipe.micro_batch)
    batches = stream.held_out_batches(samples, micro_batch, 0, 1)
    return [batch for batch, _ in batches]


def draw_mixture(rows: Sequence[Row], path: Path) -> None:
    """Median and quantiles of the mixture against the layer."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    layer = [row["layer"] for row in rows]
    for low, high in (("q0.05", "q0.95"), ("q0.25", "q0.75")):
        axes.fill_between(
            layer, [row[low] for row in rows], [row[high] for row in rows], alpha=0.25
        )
    axes.plot(layer, [row["q0.50"] for row in rows], "o-", label="median (5, 25, 75, 95 %)")
    axes.axhline(0.5, color="gray", linewidth=0.8)
    axes.set(xlabel="layer", ylabel="share of the spatial channel", ylim=(0, 1))
    axes.legend()
    _save(figure, path)


def draw_masses(rows: Sequence[Row], path: Path) -> None:
    """One map, layers by heads, for each kind of key."""
    heads = 1 + max(int(row["head"]) for row in rows)
    figure = Figure(figsize=(3.2 * len(KINDS), 3.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        values = Tensor([float(row[kind]) for row in rows]).view(-1, heads)
        shown = axes.imshow(values.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set(title=f"on {kind}", xlabel="head", ylabel="layer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    figure.colorbar(shown, ax=figure.axes, label="mean attention")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _write_table(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


if __name__ == "__main__":
    main()
