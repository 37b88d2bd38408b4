"""Rows of a benchmark as files: NAME.json for programs, NAME.md and NAME.png for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megavideo.files import atomic_path, atomic_write
from megavideo.log import log

Row = dict[str, Any]
# What identifies a row among those of a file; rows of two files are compared if these are equal.
KEYS = ("subject", "contender", "layout", "micro_batch", "threads")
# Figures that are compared, each a path into a row.
FIGURES = (
    "step_s.p50",
    "clips_per_s",
    "tokens_per_s",
    "memory_gib",
    "samples_per_s",
    "seconds",
    "mib_per_s",
)


def write_results(output: Path, name: str, rows: Sequence[Row], page: str, figure: Figure) -> None:
    """Write the three files into the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    with atomic_write(output / f"{name}.json") as file:
        file.write(json.dumps(list(rows), indent=1).encode() + b"\n")
    with atomic_write(output / f"{name}.md") as file:
        file.write(page.encode())
    with atomic_path(output / f"{name}.png") as path:
        figure.savefig(path, format="png", dpi=120)
    log.info("wrote %s", output / f"{name}.md")


def table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [columns, ["---"] * len(columns), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def conditions(row: Row) -> str:
    """One line that says where and with what a row was measured."""
    parts = [
        row["device"] + (f" x {row['processes']}" if "processes" in row else ""),
        f"driver {row['driver'] or 'none'}",
        f"torch {row['torch']}",
        *([f"deepspeed {row['deepspeed']}"] if "deepspeed" in row else []),
        f"commit {row['commit'] or 'unknown'}",
        row["date"],
    ]
    return ", ".join(parts) + "."


def bars(
    names: Sequence[str], series: Mapping[str, Sequence[float]], label: str, title: str
) -> Figure:
    """A horizontal bar for each name, stacked from `series`."""
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for part, values in series.items():
        axes.barh(range(len(names)), values, left=left, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize="medium")
    if len(series) > 1:
        axes.legend(fontsize="small")
    return figure


def compare(first: Path, second: Path) -> str:
    """Every figure that rows of both files have, with the ratio second / first.

    Raises:
        ValueError: if a file is no benchmark's, or no row is in both.
    """
    one, other = _by_key(first), _by_key(second)
    lines = [
        [_name(key), figure, f"{a:.4g}", f"{b:.4g}", f"{b / a:.3f}" if a else "-"]
        for key in one
        if key in other
        for figure in FIGURES
        if (a := _figure(one[key], figure)) is not None
        and (b := _figure(other[key], figure)) is not None
    ]
    if not lines:
        raise ValueError(
            f"{first} has {', '.join(map(_name, one)) or 'no rows'}, {second} has "
            f"{', '.join(map(_name, other)) or 'no rows'}: nothing that both measured"
        )
    told = [f"A: {first}: {_told(one)}", f"B: {second}: {_told(other)}"]
    return "\n".join([*told, "", table(["row", "figure", "A", "B", "B / A"], lines)])


def _by_key(path: Path) -> dict[tuple[str, ...], Row]:
    try:
        rows = json.loads(path.read_text())
        return {tuple(str(row.get(key, "")) for key in KEYS): row for row in rows}
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not what a benchmark wrote: {error}") from None


def _name(key: tuple[str, ...]) -> str:
    named = [part for part in key[:-2] if part]
    numbers = [f"{what} {part}" for what, part in zip(KEYS[-2:], key[-2:], strict=True) if part]
    return ", ".join([*named, *(number.replace("_", "-") for number in numbers)])


def _told(rows: dict[tuple[str, ...], Row]) -> str:
    return conditions(next(iter(rows.values()))) if rows else "empty"


def _figure(row: Row, path: str) -> float | None:
    """A figure of a row; the largest where ranks have one each."""
    value: Any = row
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, list):
        value = max(value)
    return value if isinstance(value, int | float) else None
