"""Loss against step: one panel a run, training and held-out."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megavideo.files import atomic_path
from megavideo.report.runs import FinishedRun

PANEL = (4.2, 3.2)  # inches


def draw_losses(runs: Sequence[FinishedRun], path: Path) -> None:
    """Write a PNG with the loss curves of `runs`."""
    width, height = PANEL
    figure = Figure(figsize=(width * len(runs), height), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        axes.plot(*run.series("loss"), label="training")
        if run.has("held_out_loss"):
            axes.plot(*run.series("held_out_loss"), "o-", label="held out")
        axes.set(title=run.name, xlabel="step", ylabel="cross-entropy (nats per token)")
        axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
