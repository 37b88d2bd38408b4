"""The order of attention backends that a run of `megavideo benchmark attention` measured.

The table is what ops/attention_table.py reads: MEGAVIDEO_ATTENTION_TABLE makes training go by it.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megavideo.benchmark.results import conditions
from megavideo.ops.attention_table import Backend, Row, Table

# Contenders that are backends, as training runs them.
BACKENDS: dict[str, Backend] = {
    "megavideo": "library",
    "flex raster": "flex",
    "sdpa blocks": "sdpa",
}
# A row of the table is for cases that are alike in these.
KEYS = ("device", "dtype", "head_size", "family")

# Contender -> case of the benchmark -> microseconds.
Times = dict[str, dict[tuple[str, int], float]]


def measured_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each kind of case that any backend ran, with those that did, fastest first.

    Args:
        rows: of a run of the benchmark; times are forward and backward, added up over batch sizes,
            stages and dropout rates.
    """
    kinds: dict[tuple[Any, ...], Times] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        is_backend = row["contender"] in BACKENDS and "reason" not in row
        if is_backend and row["direction"] == "forward+backward":
            kind = kinds[*(row[key] for key in KEYS), row["dropout"] > 0]
            case = (row["pattern"], row["batch"])
            so_far = kind[row["contender"]].get(case, 0.0)
            kind[row["contender"]][case] = so_far + row["us_median"]
    table = [
        Row(**dict(zip((*KEYS, "dropout"), kind, strict=True)), order=_order(times))
        for kind, times in kinds.items()
    ]
    return Table(source=f"measurement, {conditions(dict(rows[0])).rstrip('.')}", rows=table)


def _order(times: Times) -> list[Backend]:
    """Fastest first; who failed in some case has no place. The reference is always the last."""
    most = max(len(cases) for cases in times.values())
    ran = {name: sum(cases.values()) for name, cases in times.items() if len(cases) == most}
    return [*(BACKENDS[name] for name in sorted(ran, key=ran.__getitem__)), "reference"]
