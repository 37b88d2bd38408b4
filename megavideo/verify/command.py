"""`megavideo verify-reference DIR`: is this the published model? One row a quantity."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from megavideo.verify import superres
from megavideo.verify.compare import Row
from megavideo.verify.generation import GenerationCase
from megavideo.verify.local_attention import PARAMETERS, local_attention_rows
from megavideo.verify.sampling import sampling_rows
from megavideo.verify.sat_checkpoint import EXPECTED, checkpoint_rows
from megavideo.verify.schedule import schedule_rows
from megavideo.verify.superres import superres_rows
from megavideo.verify.training import TrainingCase

# An array that only cases of a kind have -> their check.
CASES: dict[str, type[TrainingCase] | type[GenerationCase]] = {
    "loss": TrainingCase,
    "seq_in": GenerationCase,
}


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--failures-only", is_flag=True, help="Print only rows that are not ok.")
def main(directory: Path, failures_only: bool) -> None:
    """Compare our model with every test vector in DIRECTORY.

    Prints, for each quantity, the largest error relative to the array's largest value, and what
    there is no check for. Exits with 1 if anything is out of tolerance, or nothing was checked.

    \b
    Example:
      megavideo verify-reference tests/reference/vectors
    """
    unchecked: list[str] = []
    rows = []
    click.echo(f"{'case':<34} {'quantity':<62} {'error':>9} {'tolerance':>9}")
    for row in _rows(directory, unchecked):
        rows.append(row)
        if not (row.ok and failures_only):
            click.echo(_format(row))
    for name in unchecked:
        click.echo(f"no check for {name}")
    missed = [row for row in rows if not row.ok]
    click.echo(f"{len(rows)} quantities compared, {len(missed)} out of tolerance")
    if missed or not rows:
        sys.exit(1)


def _format(row: Row) -> str:
    verdict = "ok" if row.ok else "MISS"
    return f"{row.case:<34} {row.quantity:<62} {row.error:9.1e} {row.tolerance:9.1e} {verdict}"


def _rows(directory: Path, unchecked: list[str]) -> Iterator[Row]:
    for path in sorted(directory.iterdir()):
        if (path / EXPECTED).is_file():
            yield from checkpoint_rows(path)
        elif path.is_dir():
            unchecked.append(f"{path.name}/")
        elif path.name.endswith(".npz") and not path.name.endswith(".w.npz"):
            yield from _array_rows(path, unchecked)


def _array_rows(path: Path, unchecked: list[str]) -> Iterator[Row]:
    values = _arrays(path)
    meta = json.loads(bytes(values["meta_json"])) if "meta_json" in values else {}
    weights = path.with_name(path.name.replace(".v.npz", ".w.npz"))
    kind = next((CASES[key] for key in CASES if key in values), None)
    if kind is not None and weights.is_file():
        case = kind(path.name.removesuffix(".v.npz"), meta, _arrays(weights), values)
        yield from case.rows()
        unchecked += [f"{path.name}: {key}" for key in case.unchecked()]
    elif {"step", "lr"} <= values.keys():
        yield from schedule_rows(path.stem, meta, values)
    elif "cluster_labels" in values:
        yield from sampling_rows(path.stem, meta, values)
    elif meta.get("kind") in ("dsr", "itersr"):
        yield from superres_rows(path.stem, meta, values)
        unchecked += [f"{path.name}: {key}" for key in superres.unchecked(values)]
    elif any(key.endswith(f"/{PARAMETERS}") for key in values):
        yield from local_attention_rows(path.stem, values)
    else:
        unchecked.append(path.name)


def _arrays(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}
