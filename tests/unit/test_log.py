"""Progress bars on a terminal."""

import io

import pytest

from megavideo import log


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_inside_another_is_a_line_of_the_same_display(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr", Terminal())
    with log.progress("outer", total=2) as outer:
        display = log._display
        assert display is not None
        with log.progress("inner", total=3) as inner:
            inner(2)
            outer(1)
            assert log._display is display
            assert [task.completed for task in display.tasks] == [1, 2]
        assert [task.description for task in display.tasks] == ["outer"]
    assert log._display is None
