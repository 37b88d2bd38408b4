"""The program that measures conversions runs: a tiny model goes through all formats and back."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from megavideo.checkpoint.convert_command import main as convert
from tests import measure_convert
from tests.measure_convert import ROUTES, Cost, main


def test_every_route_is_measured_and_what_comes_back_is_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(arguments: list[str]) -> Cost:
        CliRunner().invoke(convert, arguments, catch_exceptions=False)
        return Cost(1.0, 1.0, 1 << 20)

    monkeypatch.setattr(measure_convert, "_in_a_process", in_this_process)
    sizes = ["--layers", "2", "--hidden", "48", "--words", "20012", "--repeat", "1"]
    result = CliRunner().invoke(main, [str(tmp_path / "folder"), *sizes], catch_exceptions=False)
    *rows, last = result.output.splitlines()
    assert [row.split()[2] for row in rows[1:]] == [target for _, target, _ in ROUTES]
    assert "bit for bit" in last and not list(tmp_path.iterdir())
