"""`make gpu` where there is no GPU: commands parse, parts fail alone, it says what it needs."""

import importlib
import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch

from megavideo.benchmark.published import check_published
from megavideo.benchmark.step_command import ALWAYS, UNUSED, accumulated
from megavideo.cli import COMMANDS
from megavideo.config.load import load_config
from tests.kernels import test_interval, test_interval_on_gpu, test_neighbourhood

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / ".ci" / "gpu.py"


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("first_hour", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["first_hour"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def megavideo_commands() -> list[list[str]]:
    """The arguments of each megavideo command of a dry run."""
    command = [sys.executable, str(PROGRAM), "--dry-run", "--output", "somewhere"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    given = [shlex.split(line) for line in lines]
    return [words[words.index("megavideo") + 1 :] for words in given if "megavideo" in words]


def test_make_runs_it() -> None:
    # Tests may run under make themselves, which then says which folder it enters and leaves.
    make = ["make", "--no-print-directory", "-n", "gpu"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip().endswith("/python .ci/gpu.py")


def test_every_command_line_is_one_that_the_program_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = megavideo_commands()
    assert [words[:2] for words in commands] == [
        ["benchmark", "attention"], ["benchmark", "step"], ["calibrate", "--output"],
    ]  # fmt: skip
    for name, *arguments in commands:
        module, function = COMMANDS[name][0].split(":")
        command = getattr(importlib.import_module(module), function)
        if isinstance(command, click.Group):
            name, *arguments = arguments
            command = command.commands[name]
        command.make_context(name, arguments)


def test_the_step_is_a_configuration_that_the_published_step_takes(program: ModuleType) -> None:
    files = [str(ROOT / word) for word in program.STEP if word.startswith("configs/")]
    config = load_config(files, [*UNUSED, program.STEP[-1], *ALWAYS])
    config = accumulated(config, 1, replicas=1)
    check_published(config)
    assert (config.recipe.batch, config.recipe.micro_batch) == (2, 2)
    assert config.model.layers == 48


def test_sanitizers_get_small_cases_of_both_families(program: ModuleType) -> None:
    def chosen(cases: list) -> int:  # type: ignore[type-arg]
        return sum(any(word in str(case) for word in program.SMALL) for case in cases)

    assert chosen(test_interval.CASES) >= 5
    assert chosen(test_neighbourhood.CASES) >= 2
    assert chosen([*test_interval_on_gpu.FULL, *test_neighbourhood.PUBLISHED]) == 0


def test_a_part_that_fails_does_not_stop_those_after_it(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(name: str, code: str, minutes: float = 1.0, **more: object):  # type: ignore[no-untyped-def]
        return program.Part(name, (sys.executable, "-c", code), minutes, **more)

    write = f"open({str(tmp_path / 'page.md')!r}, 'w').write('# Table\\nrows\\n')"
    todo = [
        part("broken", "print('the reason'); raise SystemExit(3)"),
        part("slow", "import time; time.sleep(60)", minutes=0.01),
        part("absent", "", missing="no such tool"),
        part("good", write, page=tmp_path / "page.md"),
        part("set", "import os; assert os.environ['A'] == 'b'", environment={"A": "b"}),
    ]
    outcomes = list(program.run_all(todo, tmp_path))
    assert [outcome.failed for outcome in outcomes] == [True, True, False, False, False]
    assert "    the reason\n" in capsys.readouterr().out
    text = program.summary("Some GPU", outcomes)
    assert "| broken | failed with status 3 |" in text
    assert "| slow | stopped after 0.01 minutes |" in text
    assert "| absent | left out: no such tool | 0.0 |  |" in text
    assert text.endswith("\n## Table\nrows\n")


@pytest.mark.parametrize(("code", "status"), [("", 0), ("raise SystemExit(3)", 1)])
def test_the_status_says_whether_any_part_failed(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, status: int
) -> None:
    todo = [program.Part(name, (sys.executable, "-c", code), 1.0) for name in ("one", "two")]
    monkeypatch.setattr(program, "parts", lambda output, sanitizer: todo)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "out")])
    assert program.main() == status
    text = (tmp_path / "out" / "summary.md").read_text()
    assert text.startswith("# Some GPU, ") and "| one |" in text and "| two |" in text


def test_without_a_gpu_it_stops_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--output", str(tmp_path / "out")]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: torch") and done.stderr.count("\n") == 1
    assert not done.stdout and not (tmp_path / "out").exists()
