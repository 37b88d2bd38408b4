"""The command line as a user meets it: quick help, one-line errors, honest exit codes."""

import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from megavideo.cli import COMMANDS, run
from megavideo.files import atomic_write


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


def test_a_full_disk_is_one_line_and_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def fill() -> None:
        with atomic_write(tmp_path / "shard.tar"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as write(2) says it

    with pytest.raises(SystemExit, match="2"):
        run(fill, args=[])
    assert re.fullmatch(
        r"error: .*No space left on device: .*shard\.tar'\n", capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_system_that_names_no_file_keeps_its_traceback() -> None:
    @click.command()
    def lose() -> None:
        raise ConnectionResetError("a bug, or a network")

    with pytest.raises(ConnectionResetError):
        run(lose, args=[])


def test_an_unknown_command_is_an_error() -> None:
    result = megavideo("trian")
    assert result.returncode == 2
    assert "No such command 'trian'" in result.stderr
