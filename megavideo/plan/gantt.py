"""A picture of a pipeline's schedule: which stage computes which micro-batch when."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from megavideo.files import atomic_path
from megavideo.plan.schedule import Bar

# Light to dark: virtual stages of a rank.
FORWARD = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")
BACKWARD = ("#a1d99b", "#74c476", "#31a354", "#006d2c")
MOST_NUMBERS = 400


def draw(bars: Sequence[Bar], pp: int, title: str, path: Path) -> None:
    """Write a PNG: a row for each rank, forward passes blue, backward passes green."""
    figure, axes = plt.subplots(figsize=(14, 1.2 + 0.45 * pp))
    for bar in bars:
        colours = FORWARD if bar.action.forward else BACKWARD
        colour = colours[bar.action.run // pp % len(colours)]
        width = bar.end - bar.start
        axes.barh(bar.rank, width, left=bar.start, color=colour, edgecolor="white", linewidth=0.4)
        if len(bars) <= MOST_NUMBERS:
            middle = bar.start + width / 2
            number = str(bar.action.micro_batch)
            axes.text(middle, bar.rank, number, ha="center", va="center", fontsize=6)
    axes.set(yticks=range(pp), xlabel="seconds", ylabel="pipeline rank", title=title)
    axes.invert_yaxis()
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
