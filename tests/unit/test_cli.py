"""The command line as a user meets it: quick help, one-line errors, honest exit codes."""

import subprocess
import sys
import time

import pytest

from megavideo.cli import COMMANDS


def megavideo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megavideo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_imports_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from megavideo.cli import group;"
        "out = CliRunner().invoke(group, ['--help']).output; assert 'config' in out;"
        "assert not {'torch', 'deepspeed', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_takes_less_than_a_second() -> None:
    times = []
    for _ in range(3):
        start = time.monotonic()
        assert megavideo("--help").returncode == 0
        times.append(time.monotonic() - start)
    assert min(times) < 1.0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = megavideo(command, "--help")
    assert result.returncode == 0, result.stderr
    assert "Example" in result.stdout


def test_a_mistake_is_one_line_and_status_2() -> None:
    result = megavideo("config", "nowhere.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no configuration file nowhere.yaml")
    assert "Traceback" not in result.stderr


def test_an_unknown_command_is_an_error() -> None:
    result = megavideo("trian")
    assert result.returncode == 2
    assert "No such command 'trian'" in result.stderr
