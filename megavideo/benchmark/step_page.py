"""Rows of training steps as a page and a picture."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from megavideo.benchmark.results import Row, bars, conditions, table
from megavideo.benchmark.step import PHASES

COLUMNS = [
    "step", "micro-batch", "ms (p20-p80)", "clips/s", "tokens/s", "MFU", "MFU 6N", "HFU", "GiB",
    "peak TFLOP/s", "skew", "ratio",
]  # fmt: skip


def measured(rows: Sequence[Row]) -> list[Row]:
    """Those that have figures, not a reason why there are none."""
    return [row for row in rows if "reason" not in row]


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """`rows`, each with its speed over the first's that was measured."""
    good = measured(rows)
    return [
        row if "reason" in row else row | {"ratio": row["clips_per_s"] / good[0]["clips_per_s"]}
        for row in rows
    ]


def page(title: str, rows: Sequence[Row]) -> str:
    """Markdown: conditions, figures, where the time goes, and what failed, with reasons."""
    good = measured(rows)
    parts = [f"# {title}"]
    if good:
        peak = f"Peak of a device: {good[0]['peak_from']}."
        parts += [
            f"{conditions(good[0])} {peak}",
            table(COLUMNS, [_line(row) for row in good]),
            table(["share of a step", *PHASES], [_shares(row) for row in good]),
        ]
    failed = [f"- {name(row)}: {row['reason']}" for row in rows if "reason" in row]
    return "\n\n".join([*parts, *(["Not measured:\n\n" + "\n".join(failed)] if failed else [])])


def picture(title: str, rows: Sequence[Row]) -> Figure:
    """Milliseconds of a step by phase; the split is scaled to the step without timers."""
    good = measured(rows)
    series = {
        phase: [1e3 * row["step_s"]["p50"] * _share(row, phase) for row in good] for phase in PHASES
    }
    seen = {phase: values for phase, values in series.items() if any(v > 0 for v in values)}
    return bars([name(row) for row in good], seen, "ms a step (median)", title)


def name(row: Row) -> str:
    """As `megavideo, tp2-zero1`."""
    return f"{row['contender']}, {row['layout']}"


def _line(row: Row) -> list[str]:
    step, skew = row["step_s"], row["skew"]
    times = f"{1e3 * step['p50']:.4g} ({1e3 * step['p20']:.4g}-{1e3 * step['p80']:.4g})"
    return [
        name(row),
        f"{row['micro_batch']} x {row['micro_batches']}",
        times,
        f"{row['clips_per_s']:.4g}",
        f"{row['tokens_per_s']:,.0f}",
        *(f"{row[key]:.1%}" for key in ("mfu", "mfu_6n", "hfu")),
        f"{max(row['memory_gib']):.2f}",
        f"{row['peak_tflops']:.4g}",
        f"{skew['slowest_over_mean']:.2f}",
        f"{row['ratio']:.3f}",
    ]


def _shares(row: Row) -> list[str]:
    return [name(row), *(f"{_share(row, phase):.1%}" for phase in PHASES)]


def _share(row: Row, phase: str) -> float:
    return max(0.0, float(row["split_s"][phase])) / sum(row["split_s"].values())
