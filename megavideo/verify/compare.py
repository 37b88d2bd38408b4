"""One compared quantity is one row: the largest error relative to the array's largest value.

Also what all cases share: how their metadata names a model's sizes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

# By type of the reference. An implementation from the formulas alone is within 3e-15 and 1.3e-6;
# the smallest mistake that was tried is far outside. Integers and masks must be equal.
TOLERANCE = {"float64": 1e-9, "float32": 2e-4}


@dataclass(frozen=True)
class Row:
    """Result of one comparison."""

    case: str
    quantity: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within tolerance; NaN is not."""
        return self.error <= self.tolerance


def compare(case: str, quantity: str, ours: np.ndarray, reference: np.ndarray, dtype: str) -> Row:
    """Compare two arrays; a difference in shape is an infinite error.

    Args:
        dtype: type that the reference was computed in, a key of TOLERANCE, or "exact".
    """
    tolerance = TOLERANCE.get(dtype, 0.0)
    if ours.shape != reference.shape:
        return Row(case, quantity, float("inf"), tolerance)
    difference = np.abs(ours.astype(np.float64) - reference.astype(np.float64))
    largest = float(np.abs(reference.astype(np.float64)).max(initial=0.0))
    return Row(case, quantity, float(difference.max(initial=0.0)) / (largest or 1.0), tolerance)


def sizes(meta: dict[str, Any]) -> dict[str, int]:
    """ModelConfig's sizes in a case's metadata (FL is a frame's length, TL the text's)."""
    names = {"hidden": "h", "heads": "nh", "layers": "L", "text_slots": "TL", "frames": "F"}
    return {
        **{ours: meta[theirs] for ours, theirs in names.items()},
        "side": round(meta["FL"] ** 0.5),
    }
