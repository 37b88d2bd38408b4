"""Measured layouts beside what `megavideo plan` predicts, and whether the order is right."""

from collections.abc import Sequence
from statistics import correlation

from megavideo.benchmark.results import Row, table
from megavideo.benchmark.step_page import measured, name
from megavideo.benchmark.worlds import Case
from megavideo.plan.hardware import Hardware
from megavideo.plan.predict import Predictor

COLUMNS = ["layout", "predicted ms", "measured ms", "error"]
# On a CPU other programs share the cores, and ranks each other's; processor seconds do not show it.
PROCESSOR_COLUMNS = ["predicted, no waiting", "processor ms", "error"]


def with_predictions(rows: Sequence[Row], cases: Sequence[Case], hardware: Hardware) -> list[Row]:
    """`rows`, each that was measured with the predicted seconds of a step, and the error.

    Checkpoints are left out: the measured steps save none.

    Raises:
        ValueError: if the hardware has no figures for the precision.
    """
    predictor = Predictor(hardware)
    result = []
    for row, case in zip(rows, cases, strict=True):
        if "reason" not in row:
            found = predictor.predict(case.config, case.world_size)
            seconds = found.step_s - found.parts["checkpoints"]
            error = seconds / row["step_s"]["p50"] - 1
            row = row | {"predicted_s": seconds, "prediction_error": error}
            if hardware.kind == "cpu":
                busy = seconds - found.parts["pipeline"]
                error = busy / row["processor_s"] - 1
                row |= {"predicted_processor_s": busy, "processor_error": error}
        result.append(row)
    return result


def prediction_page(rows: Sequence[Row], hardware: Hardware) -> str:
    """Markdown: predicted and measured, the error, and the rank correlation of both orders."""
    good = measured(rows)
    on_cpu = hardware.kind == "cpu"
    columns = COLUMNS + PROCESSOR_COLUMNS * on_cpu
    parts = [f"Predicted for `{hardware.name}`:", table(columns, [_line(row) for row in good])]
    if len(good) > 2:
        step = [row["step_s"]["p50"] for row in good]
        order = rank_correlation([row["predicted_s"] for row in good], step)
        told = f"Rank correlation of {len(good)} layouts: {order:.2f}"
        if on_cpu:
            busy = [row["predicted_processor_s"] for row in good]
            order = rank_correlation(busy, [row["processor_s"] for row in good])
            told += f", in processor seconds {order:.2f}"
        parts.append(f"{told}.")
    return "\n\n".join(parts)


def _line(row: Row) -> list[str]:
    times = row["predicted_s"], row["step_s"]["p50"]
    cells = [name(row), *(f"{1e3 * time:.4g}" for time in times), f"{row['prediction_error']:+.0%}"]
    if "processor_error" not in row:
        return cells
    times = row["predicted_processor_s"], row["processor_s"]
    return [*cells, *(f"{1e3 * time:.4g}" for time in times), f"{row['processor_error']:+.0%}"]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: 1 if both order alike, -1 if the other way round; equal values share a rank."""
    return correlation(*([_rank(value, values) for value in values] for values in (first, second)))


def _rank(value: float, values: Sequence[float]) -> float:
    return sum((other < value) + (other <= value) for other in values) / 2
