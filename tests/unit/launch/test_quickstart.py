"""launch/quickstart.sh: every command that it gives is one that megavideo takes."""

import os
import subprocess
from itertools import pairwise
from pathlib import Path

import click
import pytest

from megavideo.cli import group

SCRIPT = Path(__file__).parents[3] / "launch" / "quickstart.sh"
RECORD = """#!/bin/sh
printf '%s\\037' "$@" >> "$CALLS"
printf '\\n' >> "$CALLS"
"""


@pytest.fixture
def calls(tmp_path: Path) -> list[list[str]]:
    """What the script calls `megavideo` with, itself or through torchrun, where nothing is done."""
    for name in ("megavideo", "torchrun"):
        (tmp_path / name).write_text(RECORD)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    called = tmp_path / "calls"
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "run")],
        env={**os.environ, "PATH": path, "CALLS": str(called)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\x1f")[:-1] for line in called.read_text().splitlines()]
    return [words[words.index("megavideo") + 1 :] if "-m" in words else words for words in lines]


def test_every_command_is_one_that_megavideo_takes(calls: list[list[str]]) -> None:
    assert len(calls) > 15
    for name, *arguments in calls:
        command = group.get_command(click.Context(group), name)
        assert command is not None, name
        context = click.Context(command, info_name=name)
        given, _, _ = command.make_parser(context).parse_args(list(arguments))
        lacking = {p.name for p in command.params if p.required} - given.keys()
        assert not lacking, f"{name}: {lacking}"


def test_what_a_command_reads_was_written_before(calls: list[list[str]], tmp_path: Path) -> None:
    """Of files and folders of the run: each first stands behind an option that writes."""
    writes = {"--out", "--output", "--json", "--preview", "--png"}
    known: set[str] = set()
    for words in calls:
        for option, word in pairwise(words):
            setting, _, value = word.rpartition("=")
            if value.startswith(str(tmp_path)):
                read = any(value == path or value.startswith(f"{path}/") for path in known)
                written = option in writes or setting == "run.directory"
                written |= words[0] == "tokenize-videos" and word == words[2]
                assert read or written, (words[0], word)
                known.add(value)
