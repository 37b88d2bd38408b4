"""`megavideo benchmark attention`: the fused kernels beside everything that could replace them.

All figures of a run come from one process, interleaved, on random data in rotated input sets, and
are read against the machine's own ceilings measured in the same run. Work counts the pairs that the
rule shows, so that time spent on hidden pairs lowers a contender's TFLOP/s.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor

from megavideo import options
from megavideo.benchmark.attention_order import measured_table
from megavideo.benchmark.contenders import CONTENDERS, REORDERED, CannotRun, Problem, Ready
from megavideo.benchmark.harness import Ceilings, environment, measure_ceilings, time_interleaved
from megavideo.files import atomic_path, atomic_write, write_json
from megavideo.layout.grid import Grid
from megavideo.layout.render import visible_pairs
from megavideo.layout.rules import Rule, spatial_rule, temporal_rule
from megavideo.log import log, progress
from megavideo.ops import reference

INPUT_SETS = 3
# Largest error relative to the largest value; bfloat16's is 2^-8 per rounding.
TOLERANCE = 0.03
OURS = "megavideo"


@dataclass(frozen=True)
class Pass:
    """What one direction must do: products of scores' size, rows of image and of text moved."""

    products: int
    image_rows: int
    text_rows: int


# Forward reads q, k, v and writes o; backward reads q, k, v, o, do and writes dq, dk, dv.
FORWARD = Pass(products=2, image_rows=4, text_rows=2)
BACKWARD = Pass(products=5, image_rows=8, text_rows=4)
DIRECTIONS = {"forward": (FORWARD,), "forward+backward": (FORWARD, BACKWARD)}


@dataclass(frozen=True)
class Case:
    """A pattern of the model at one size."""

    pattern: str
    rule: Rule
    batch: int
    dropout: float
    heads: int
    head_size: int
    text: int
    dtype: torch.dtype

    def draw(self, device: torch.device) -> Problem:
        """Random inputs."""
        rows = (self.heads, self.head_size)

        def normal(*shape: int) -> Tensor:
            drawn = torch.randn(self.batch, *shape, *rows, device=device).to(self.dtype)
            return drawn.requires_grad_()

        length = torch.full((self.batch,), self.text, device=device)
        return Problem(
            self.rule, self.dropout, normal(self._slots, 3), normal(self.text, 2), length
        )

    def flops(self, direction: str) -> float:
        """That the rule needs: 2 D per pair and product."""
        return sum(self._product_flops * part.products for part in DIRECTIONS[direction])

    def floor(self, direction: str, ceilings: Ceilings) -> float:
        """Microseconds below which this machine cannot be: of each pass, its slower resource."""
        row = self.batch * self.heads * self.head_size * self.dtype.itemsize
        seconds = 0.0
        for part in DIRECTIONS[direction]:
            flops = self._product_flops * part.products
            moved = row * (part.image_rows * self._slots + part.text_rows * self.text)
            seconds += max(flops / ceilings.flops_per_second, moved / ceilings.bytes_per_second)
        return 1e6 * seconds

    @property
    def _product_flops(self) -> float:
        pairs = visible_pairs(self.rule) + self._slots * self.text
        return 2.0 * self.batch * self.heads * self.head_size * pairs

    @property
    def _slots(self) -> int:
        return self.rule.frames * self.rule.side**2


def patterns(grid: Grid, window: int) -> dict[str, Rule]:
    """Every attention pattern of the two stages."""
    rules = {}
    for name, stage in (("stage 1", "keyframes"), ("stage 2", "interpolation")):
        rules[f"spatial, {name}"] = spatial_rule(grid, stage)
        rules[f"windows, {name}"] = temporal_rule(grid, stage, window, layer=0)
        rules[f"shifted windows, {name}"] = temporal_rule(grid, stage, window, layer=1)
    return {"whole causal": temporal_rule(grid, "keyframes", 0, layer=0), **rules}


def measure(
    case: Case, device: torch.device, ceilings: Ceilings, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row per contender and direction; one that cannot run has `reason` instead of times."""
    problems = [case.draw(device) for _ in range(INPUT_SETS)]
    ready: dict[str, list[Ready]] = {}
    for name in CONTENDERS:
        try:
            ready[name] = _prepare(name, problems)
        except (CannotRun, RuntimeError, NotImplementedError) as obstacle:  # out of memory is one
            reason = " ".join(str(obstacle).split())[:200]
            yield from ({**_labels(case, name, d), "reason": reason} for d in DIRECTIONS)
    for direction in DIRECTIONS:
        calls = {
            name: [_call(each, direction) for each in several] for name, several in ready.items()
        }
        times = time_interleaved(calls, rounds, warmup=max(3, rounds // 5), device=device)
        floor = case.floor(direction, ceilings)
        for name, timing in times.items():
            yield {
                **_labels(case, name, direction),
                **{f"us_{key}": round(value, 2) for key, value in asdict(timing).items()},
                "tflops": round(case.flops(direction) / timing.median / 1e6, 3),
                "floor_us": round(floor, 2),
                "share_of_floor": round(floor / timing.median, 4),
                "times_ours": round(timing.median / times[OURS].median, 3)
                if OURS in times
                else None,
            }


def _labels(case: Case, contender: str, direction: str) -> dict[str, Any]:
    sizes = {"heads": case.heads, "head_size": case.head_size, "text": case.text}
    layout = {"frames": case.rule.frames, "side": case.rule.side}
    labels = {
        "pattern": case.pattern,
        "family": case.rule.family,
        "batch": case.batch,
        "dropout": case.dropout,
    }
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        **labels,
        **layout,
        **sizes,
        "dtype": dtype,
        "direction": direction,
        "contender": contender,
    }


def _prepare(name: str, problems: Sequence[Problem]) -> list[Ready]:
    """The contender on each input set, run once both ways; raises CannotRun if it is wrong."""
    ready = [CONTENDERS[name](problem) for problem in problems]
    out = ready[0].forward()
    _call(ready[0], "forward+backward")()
    if name not in REORDERED and not problems[0].dropout:
        given = problems[0]
        inputs = (given.image_qkv.detach(), given.text_kv.detach(), given.text_length)
        expected, _ = reference.forward(*inputs, given.rule, 0.0, 0)
        error = (out.detach() - expected).abs().max() / expected.abs().max()
        if not error < TOLERANCE:
            raise CannotRun(f"is wrong here: off by {float(error):.2g} of the largest value")
    return ready


def _call(ready: Ready, direction: str) -> Callable[[], object]:
    if direction == "forward":

        @torch.no_grad()
        def forward() -> Tensor:
            return ready.forward()

        return forward
    grad = torch.randn_like(ready.forward())
    return lambda: torch.autograd.grad(ready.forward(), ready.leaves, grad)


@click.command()
@options.results_folder
@click.option("--device", default="cuda", show_default=True, help="cuda, or cpu to try it out.")
@click.option("--batch", multiple=True, default=(4, 8), show_default=True, help="Repeatable.")
@click.option("--dropout", multiple=True, default=(0.0, 0.1), show_default=True, help="Likewise.")
@click.option("--pattern", multiple=True, help="Parts of names, as 'windows'; all by default.")
@click.option("--frames", default=5, show_default=True)
@click.option("--side", default=20, show_default=True, help="Tokens along a frame's side.")
@click.option("--window", default=10, show_default=True, help="Side of the temporal windows.")
@click.option("--text", default=64, show_default=True, help="Text slots, all real.")
@click.option("--heads", default=48, show_default=True)
@click.option("--head-size", default=64, show_default=True)
@click.option("--rounds", default=50, show_default=True, help="Timed rounds; medians are of these.")
def main(
    output: Path,
    device: str,
    batch: tuple[int, ...],
    dropout: tuple[float, ...],
    pattern: tuple[str, ...],
    frames: int,
    side: int,
    window: int,
    text: int,
    heads: int,
    head_size: int,
    rounds: int,
) -> None:
    """Time local attention: our kernels, torch's alternatives, the published dense code.

    Writes attention.jsonl (a row per case and contender), attention.md and attention.png, and
    attention_table.json: the order in which training tries backends on this machine, where
    MEGAVIDEO_ATTENTION_TABLE names that file. Defaults are the published model's sizes. A contender
    whose output is wrong is not timed, and the row says so.

    \b
    Example, on a laptop, where the fused kernels cannot run:
      megavideo benchmark attention --output runs/benchmark --device cpu \\
          --batch 1 --side 8 --window 4 --heads 2 --rounds 5
    """
    where = torch.device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device here; --device cpu tries the program out")
    grid = Grid(text=text, frames=frames, side=side)
    chosen = {
        name: rule
        for name, rule in patterns(grid, window).items()
        if not pattern or any(part in name for part in pattern)
    }
    if not chosen:
        names = ", ".join(patterns(grid, window))
        raise ValueError(f"--pattern {' '.join(pattern)} is part of no name; there are {names}")
    cases = [
        Case(name, rule, b, p, heads, head_size, text, dtype)
        for name, rule in chosen.items()
        for b in batch
        for p in dropout
    ]
    output.mkdir(parents=True, exist_ok=True)
    rows = _run(cases, where, rounds)
    with atomic_write(output / "attention.jsonl") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    with atomic_write(output / "attention.md") as file:
        file.write(page(rows).encode())
    with atomic_path(output / "attention.png") as path:
        draw(rows).savefig(path, format="png", dpi=120)
    write_json(output / "attention_table.json", measured_table(rows).model_dump())
    log.info("wrote %s", output / "attention.md")
    table = output / "attention_table.json"
    log.info("MEGAVIDEO_ATTENTION_TABLE=%s makes training go by this order", table)


def _run(cases: Sequence[Case], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    ceilings = measure_ceilings(device, rounds)
    context = {**environment(device), **asdict(ceilings), "rounds": rounds}
    rows = []
    with progress("measuring", total=len(cases)) as advance:
        for case in cases:
            rows += [{**row, **context} for row in measure(case, device, ceilings, rounds)]
            advance()
    return rows


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the machine, a table of what was measured, and what was not, with reasons."""
    first = rows[0]
    columns = "pattern|B|dropout|direction|contender|us (p20-p80)|TFLOP/s|of floor|x ours"
    lines = [
        "# Local attention",
        "",
        f"{first['device']}, driver {first['driver'] or 'none'}, torch {first['torch']}, "
        f"commit {first['commit'] or 'unknown'}, {first['date']}, {first['dtype']}, "
        f"{first['rounds']} rounds.",
        f"Ceilings in this run: copy {first['bytes_per_second'] / 1e12:.3f} TB/s, "
        f"product {first['flops_per_second'] / 1e12:.2f} TFLOP/s.",
        "",
        f"|{columns}|",
        "|" + "---|" * (columns.count("|") + 1),
    ]
    lines += [_line(row) for row in rows if "reason" not in row]
    lines += ["", "Not measured:", ""]
    reasons = {f"- {row['contender']}: {row['reason']}" for row in rows if "reason" in row}
    return "\n".join([*lines, *(sorted(reasons) or ["- nothing"])]) + "\n"


def _line(row: dict[str, Any]) -> str:
    ratio = "" if row["times_ours"] is None else f"{row['times_ours']:.2f}"
    cells = [
        *(str(row[key]) for key in ("pattern", "batch", "dropout", "direction", "contender")),
        f"{row['us_median']:.0f} ({row['us_p20']:.0f}-{row['us_p80']:.0f})",
        *(f"{row['tflops']:.3g}", f"{row['share_of_floor']:.0%}", ratio),
    ]
    return f"| {' | '.join(cells)} |"


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Share of the floor per pattern and contender: forward, the first batch and dropout."""
    first = rows[0]
    shown = [
        row
        for row in rows
        if "reason" not in row
        and row["direction"] == "forward"
        and (row["batch"], row["dropout"]) == (first["batch"], first["dropout"])
    ]
    names = list(dict.fromkeys(row["pattern"] for row in shown))
    contenders = [name for name in CONTENDERS if any(row["contender"] == name for row in shown)]
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(contenders))
    for i, contender in enumerate(contenders):
        bars = {r["pattern"]: r["share_of_floor"] for r in shown if r["contender"] == contender}
        places = [j + (i - (len(contenders) - 1) / 2) * width for j in range(len(names))]
        axes.bar(places, [bars.get(name, 0.0) for name in names], width, label=contender)
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    axes.set_ylabel("share of this machine's floor")
    axes.set_title(f"Forward, B={first['batch']}, dropout {first['dropout']}, {first['device']}")
    axes.legend(fontsize="small")
    return figure
