"""The table of preferred backends: what is read, which row decides, what is refused."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megavideo.ops import attention_table
from megavideo.ops.attention_table import EXPECTATION, Case, preference, read
from megavideo.ops.backends import choose

DEFAULT = "the default table, an expectation for GPUs"

SPATIAL = Case("cuda", torch.bfloat16, 64, False, "frames")
ROWS: list[dict[str, Any]] = [
    {"device": "Some GPU", "family": "everything", "dropout": False, "order": ["sdpa", "library"]},
    {"device": "Some GPU", "dtype": "bfloat16", "head_size": 64, "order": ["flex", "library"]},
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choices and tables are read once a process: forget them, before and after."""
    for name in ("MEGAVIDEO_ATTENTION", "MEGAVIDEO_ATTENTION_BACKWARD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(attention_table.VARIABLE, raising=False)
    for cached in (choose, read):
        cached.cache_clear()
    yield
    for cached in (choose, read):
        cached.cache_clear()


def name_table(monkeypatch: pytest.MonkeyPatch, path: Path, **table: Any) -> None:
    path.write_text(json.dumps({"source": "a measurement", "rows": ROWS} | table))
    monkeypatch.setenv(attention_table.VARIABLE, str(path))
    monkeypatch.setattr(attention_table, "_device_name", lambda device: "Some GPU")


def test_without_a_table_what_we_expect_decides() -> None:
    assert preference(SPATIAL).order == ("library", "flex", "reference")
    assert preference(SPATIAL).source == DEFAULT
    on_cpu = Case("cpu", torch.float32, 8, True, "windows")
    assert preference(on_cpu).order == ("sdpa", "reference")
    assert preference(Case("mps", torch.float32, 8, True, "windows")).order == ("reference",)
    assert read(EXPECTATION).rows


def test_the_first_row_that_fits_decides_and_the_expectation_stands_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name_table(monkeypatch, tmp_path / "table.json")
    causal = Case("cuda", torch.bfloat16, 64, False, "everything")
    assert preference(causal).order == ("sdpa", "library", "reference")
    noisy = Case("cuda", torch.bfloat16, 64, True, "everything")
    assert preference(noisy).order == preference(SPATIAL).order == ("flex", "library", "reference")
    assert preference(SPATIAL).source == f"a measurement ({tmp_path / 'table.json'})"
    other = Case("cuda", torch.float16, 64, True, "windows")
    assert preference(other).order == ("library", "flex", "reference")
    assert preference(other).source == DEFAULT


def test_the_dispatch_goes_by_the_table_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("megavideo"), "propagate", True)
    rows = [{"device": "cpu", "family": "windows", "order": ["library", "reference"]}]
    name_table(monkeypatch, tmp_path / "table.json", rows=rows)
    with caplog.at_level(logging.INFO, logger="megavideo"):
        assert choose("cpu", torch.float32, 8, False, "windows") == "reference"
        assert choose("cpu", torch.float32, 8, False, "frames") == "sdpa"
    first, second = caplog.messages
    assert first == (
        "attention over windows on cpu, torch.float32, head size 8, without dropout: reference; "
        f"order by a measurement ({tmp_path / 'table.json'}); not library (needs a CUDA device)"
    )
    assert second.endswith(f"sdpa; order by {DEFAULT}")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"rows": [{"device": "cpu", "order": ["fast"]}]}, r"rows\.0\.order\.0: Input should be"),
        ({"rows": [{"device": "cpu", "order": []}]}, r"rows\.0\.order: List should have"),
        ({"rows": [{"device": "cpu", "order": ["sdpa", "sdpa"]}]}, r"rows\.0\.order: .* twice"),
        ({"rows": [{"device": "cpu", "heads": 3, "order": ["sdpa"]}]}, r"rows\.0\.heads: Extra"),
        ({"rows": [{"order": ["sdpa"]}]}, r"rows\.0\.device: Field required"),
        ({"version": 2}, "version: Extra inputs"),
    ],
)
def test_a_wrong_table_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    name_table(monkeypatch, tmp_path / "table.json", **table)
    with pytest.raises(ValueError, match=f"is not a table of attention backends: {message}"):
        choose("cpu", torch.float32, 8, False, "windows")


def test_a_missing_table_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(attention_table.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"none\.json: No such file .* unset it, or name a file"):
        choose("cpu", torch.float32, 8, False, "windows")
