"""The attention benchmark times what it says, beside contenders that compute the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from megavideo.benchmark import attention, contenders
from megavideo.benchmark.attention_order import measured_table
from megavideo.benchmark.contenders import CannotRun, Problem
from megavideo.benchmark.harness import Ceilings, time_interleaved
from megavideo.layout.grid import Grid
from megavideo.ops import attention_table, reference
from megavideo.ops.attention_table import Case

GRID = Grid(text=3, frames=3, side=6)
PATTERNS = attention.patterns(GRID, window=4)
CPU = torch.device("cpu")


def case(pattern: str, dropout: float = 0.0) -> attention.Case:
    return attention.Case(pattern, PATTERNS[pattern], 2, dropout, 2, 16, GRID.text, torch.float32)


def exact(problem: Problem) -> Tensor:
    inputs = (problem.image_qkv, problem.text_kv, problem.text_length)
    return reference.forward(*inputs, problem.rule, 0.0, 0)[0]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["dense", "sdpa mask", "sdpa blocks"])
def test_contenders_for_every_pattern_compute_the_reference(name: str, pattern: str) -> None:
    problem = case(pattern).draw(CPU)
    out = contenders.CONTENDERS[name](problem).forward()
    torch.testing.assert_close(out, exact(problem), rtol=1e-4, atol=1e-5)


def test_the_causal_contender_is_whole_causal_attention_and_nothing_else() -> None:
    problem = case("whole causal").draw(CPU)
    out = contenders.sdpa_causal(problem, backend=None).forward()
    torch.testing.assert_close(out, exact(problem), rtol=1e-4, atol=1e-5)
    with pytest.raises(CannotRun, match="is causal over everything"):
        contenders.sdpa_causal(case("spatial, stage 1").draw(CPU), backend=None)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_variable_length_sequences_compute_the_reference(pattern: str) -> None:
    """Each sequence by a plain softmax, causal ones aligned at their ends as flash attention is."""
    problem = case(pattern).draw(CPU)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1) for x in problem.qkv())
    out = torch.full_like(q, torch.nan)
    for call in contenders.sequences(problem):
        for i in range(len(call.query_ends) - 1):
            queries = call.queries[call.query_ends[i] : call.query_ends[i + 1]]
            keys = call.keys[call.key_ends[i] : call.key_ends[i + 1]]
            assert len(queries) <= call.max_queries and len(keys) <= call.max_keys
            scores = q[:, queries] @ k[:, keys].transpose(-1, -2) * q.shape[-1] ** -0.5
            visible = torch.ones_like(scores, dtype=torch.bool)
            if call.causal:
                visible = visible.tril(len(keys) - len(queries))
            out[:, queries] = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[:, keys]
    out = out.transpose(0, 1).unflatten(0, (2, -1)).flatten(2)
    torch.testing.assert_close(out, exact(problem), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["shifted windows, stage 2", "spatial, stage 1"])
def test_permuted_flex_attention_computes_the_reference(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "_check_flex", lambda problem: None)
    monkeypatch.setattr(contenders, "_compiled_flex", lambda: flex_attention)
    problem = case(pattern).draw(CPU)
    with torch.no_grad():
        out = contenders.flex_permuted(problem, block=64, gather=True).forward()
    torch.testing.assert_close(out, exact(problem), rtol=1e-4, atol=1e-5)


def test_work_and_floor_follow_from_pairs_and_rows() -> None:
    one = case("spatial, stage 1")
    pairs = 2 * 2 * (3 * (36 * 37 // 2) + 108 * 3)  # B H (frames' triangles + text)
    assert one.flops("forward") == 2 * 16 * pairs * 2
    assert one.flops("forward+backward") == 2 * 16 * pairs * 7
    row = 2 * 2 * 16 * 4
    slow_memory = Ceilings(bytes_per_second=1e6, flops_per_second=1e30)
    assert one.floor("forward", slow_memory) == pytest.approx(row * (4 * 108 + 2 * 3))
    slow_compute = Ceilings(bytes_per_second=1e30, flops_per_second=1e6)
    assert one.floor("forward", slow_compute) == pytest.approx(one.flops("forward"))


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] * 2 for name in "ab"}
    times = time_interleaved(calls, rounds=3, warmup=1, device=CPU)
    assert order == ["a", "a", "b", "b"] * 4
    assert 0 < times["a"].p20 <= times["a"].median <= times["a"].p80


def test_a_contender_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: Problem) -> contenders.Ready:
        ready = contenders.dense(problem)
        return contenders.Ready(lambda: ready.forward() * 1.1, ready.leaves)

    monkeypatch.setitem(attention.CONTENDERS, "dense", wrong)
    ceilings = Ceilings(1e10, 1e10)
    rows = list(attention.measure(case("spatial, stage 1"), CPU, ceilings, rounds=2))
    (reason,) = {row["reason"] for row in rows if row["contender"] == "dense"}
    assert "is wrong here: off by 0.1" in reason
    assert all("us_median" in row for row in rows if row["contender"] == "sdpa mask")


ARGUMENTS = "--device cpu --batch 1 --side 4 --frames 2 --text 2 --window 2 --heads 1 --rounds 2"


def run(output: Path, *more: str):  # type: ignore[no-untyped-def]
    arguments = ["--output", str(output), *ARGUMENTS.split(), *more]
    return CliRunner().invoke(attention.main, arguments)


def test_the_command_writes_rows_a_page_and_a_plot(tmp_path: Path) -> None:
    result = run(tmp_path, "--pattern", "windows, stage 1", "--dropout", "0.0")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "attention.jsonl").read_text().splitlines()]
    assert {row["pattern"] for row in rows} == {"windows, stage 1", "shifted windows, stage 1"}
    assert {row["contender"] for row in rows} == set(contenders.CONTENDERS)
    timed = [row for row in rows if "reason" not in row]
    assert all(row["us_median"] > 0 and row["device"] == "cpu" for row in timed)
    page = (tmp_path / "attention.md").read_text()
    assert page.count("\n| ") == len(timed)
    assert "- megavideo: needs a CUDA device" in page
    assert (tmp_path / "attention.png").stat().st_size > 1000
    table = attention_table.read(tmp_path / "attention_table.json")
    (row,) = table.rows
    assert row.fits(Case("cpu", torch.float32, 64, False, "windows"), "cpu")
    assert row.order == ["sdpa", "reference"]
    assert table.source.startswith("measurement, cpu, driver ")


def timed(contender: str, pattern: str, us: float | None, **more: object) -> dict[str, Any]:
    labels = {"device": "Some GPU", "dtype": "bfloat16", "head_size": 64, "family": "windows"}
    outcome = {"reason": "out of memory"} if us is None else {"us_median": us}
    case = {"pattern": pattern, "batch": 4, "dropout": 0.0, "direction": "forward+backward"}
    machine = {"driver": "1", "torch": "2", "commit": "", "date": "today"}
    return {**labels, **case, **machine, "contender": contender, **outcome, **more}


def test_the_order_is_that_of_times_of_both_directions_over_all_cases() -> None:
    rows = [
        timed("megavideo", "windows", 30.0),
        timed("megavideo", "shifted windows", 10.0),
        timed("flex raster", "windows", 20.0),
        timed("flex raster", "shifted windows", 25.0),
        timed("sdpa blocks", "windows", 1.0),
        timed("sdpa blocks", "shifted windows", None),
        timed("flex raster", "windows", 1.0, direction="forward"),
        timed("megavideo atomic", "windows", 1.0),
        timed("megavideo", "whole causal", 9.0, family="everything"),
        timed("sdpa blocks", "whole causal", 8.0, family="everything"),
        timed("megavideo", "whole causal", 9.0, family="everything", dropout=0.1),
        timed("sdpa blocks", "whole causal", None, family="everything", dropout=0.1),
    ]
    table = measured_table(rows)
    assert [(row.family, row.dropout, row.order) for row in table.rows] == [
        ("windows", False, ["library", "flex", "reference"]),
        ("everything", False, ["sdpa", "library", "reference"]),
        ("everything", True, ["library", "reference"]),
    ]


def test_a_pattern_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    result = run(tmp_path, "--pattern", "diagonal")
    assert isinstance(result.exception, ValueError)
    assert "diagonal is part of no name; there are whole causal" in str(result.exception)
