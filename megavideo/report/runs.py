"""What a run's folder says about it: settings, metrics, last checkpoint, evaluations."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megavideo.checkpoint.files import combined_digest, tensor_entry
from megavideo.checkpoint.manifest import Training, read_training
from megavideo.checkpoint.sources import find_checkpoint, open_base_weights
from megavideo.config.load import load_config
from megavideo.config.schema import Config
from megavideo.model.execution import DTYPES
from megavideo.train.metrics import Row, read_rows


@dataclass(frozen=True)
class FinishedRun:
    """One run's folder.

    Attributes:
        rows: metrics, oldest first; rows of evaluations have `held_out_loss`.
        evaluations: what `megavideo evaluate --json` wrote into the folder, by its `captions`.
    """

    folder: Path
    config: Config
    rows: list[Row]
    checkpoint: Path
    training: Training
    evaluations: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

    def has(self, metric: str) -> bool:
        """Whether any row holds `metric`."""
        return any(metric in row for row in self.rows)

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values of one metric."""
        rows = [row for row in self.rows if metric in row]
        return [row["step"] for row in rows], [row[metric] for row in rows]

    def typical(self, metric: str) -> float:
        """Median over the run, without the first row, in which things are warmed up."""
        _, values = self.series(metric)
        return median(values[1:] or values)

    def last(self, metric: str) -> float:
        """The newest value."""
        return self.series(metric)[1][-1]

    def base_digest_before(self) -> str | None:
        """Digest of the weights that recipe.base holds now, in the run's precision."""
        if self.config.recipe.base is None:
            return None
        dtype = DTYPES[self.config.recipe.precision]
        base = open_base_weights(Path(self.config.recipe.base))
        return combined_digest({n: tensor_entry(base.read(n).to(dtype)) for n in base.tensors})


def open_run(folder: Path) -> FinishedRun:
    """Read a run's folder.

    Raises:
        FileNotFoundError, ValueError: if it holds no run with a whole checkpoint.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run: it has no config.yaml")
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("held-out-*.json"))]
    return FinishedRun(
        folder,
        load_config([folder / "config.yaml"]),
        read_rows(folder),
        checkpoint,
        read_training(checkpoint),
        {evaluation["captions"]: evaluation for evaluation in found},
    )
