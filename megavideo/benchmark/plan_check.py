"""Measured layouts beside what `megavideo plan` predicts, and whether the order is right."""

from collections.abc import Sequence

from megavideo.benchmark.results import Row, table
from megavideo.benchmark.step_page import measured, name
from megavideo.benchmark.worlds import Case
from megavideo.plan.hardware import Hardware
from megavideo.plan.predict import Predictor

COLUMNS = ["layout", "predicted ms", "measured ms", "error"]


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
        result.append(row)
    return result


def prediction_page(rows: Sequence[Row], hardware: Hardware) -> str:
    """Markdown: predicted and measured, the error, and the rank correlation of both orders."""
    good = measured(rows)
    lines = [
        [
            name(row),
            f"{1e3 * row['predicted_s']:.4g}",
            f"{1e3 * row['step_s']['p50']:.4g}",
            f"{row['prediction_error']:+.0%}",
        ]
        for row in good
    ]
    parts = [f"Predicted for `{hardware.name}`:", table(COLUMNS, lines)]
    if len(good) > 2:
        predicted = [row["predicted_s"] for row in good]
        order = rank_correlation(predicted, [row["step_s"]["p50"] for row in good])
        parts.append(f"Rank correlation of {len(good)} layouts: {order:.2f}.")
    return "\n\n".join(parts)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: 1 if both order alike, -1 if the other way round; no two values may be equal."""
    n = len(first)
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    distance = sum((a - b) ** 2 for a, b in zip(*ranks, strict=True))
    return 1 - 6 * distance / (n * (n * n - 1))
