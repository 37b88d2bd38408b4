"""`make gpu`: what the first hour on a machine with a GPU should tell, as one folder.

Builds the kernels for this GPU, runs the tests that need one, also under compute-sanitizer, and
measures attention, the published model's training step, and the machine. A part that fails does not
stop those after it; the status is 1 if any failed. OUTPUT/summary.md has every outcome and table.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Test cases that sanitizers, a hundred times slower than the kernels, get through in minutes.
SMALL = ("F3", "F2", "9x11")
MODEL = ("configs/model/cogvideo-9b.yaml", "configs/recipe/stage1.yaml")
# The published step keeps dense scores of a layer: two samples leave room for them in 80 GB.
STEP = (*MODEL, "configs/parallel/zero2.yaml", "--set", "recipe.micro_batch=2")
# Faults of kernels count. What CUDA's interface returns does not: torch asks it for what a GPU may
# lack, and our own calls check for themselves.
STRICT = ("--error-exitcode", "1", "--report-api-errors", "no")
# A cached allocation hides what is read past its end.
SANITIZED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


@dataclass(frozen=True)
class Part:
    """A command of its own.

    Attributes:
        minutes: after which it is stopped.
        page: Markdown that it leaves, for the summary.
        missing: why it cannot run here.
    """

    name: str
    command: Sequence[str]
    minutes: float
    page: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    missing: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a part ended; `said` is "ok", or what was wrong."""

    part: Part
    said: str
    minutes: float
    failed: bool


def parts(output: Path, sanitizer: str | None) -> list[Part]:
    """In the order in which they run; `sanitizer` is the path of compute-sanitizer, if any."""
    python = (sys.executable,)
    megavideo = (*python, "-m", "megavideo")
    tests = (*python, "-m", "pytest", "-m", "gpu")
    few = (*tests, "tests/kernels", "-k", " or ".join(SMALL))
    build = "from megavideo.ops import library; library.load(); print(library.find())"

    def sanitized(tool: str) -> Part:
        checked = (sanitizer or "compute-sanitizer", "--tool", tool, *STRICT, *few)
        missing = "" if sanitizer else "no compute-sanitizer in PATH or CUDA_HOME/bin"
        return Part(tool, checked, 60, environment=SANITIZED, missing=missing)

    return [
        Part("kernels", (*python, "-c", build), 20),
        Part("tests", tests, 60),
        sanitized("memcheck"),
        sanitized("racecheck"),
        Part(
            "attention",
            (*megavideo, "benchmark", "attention", "--output", str(output)),
            90,
            page=output / "attention.md",
        ),
        Part(
            "step",
            (*megavideo, "benchmark", "step", *STEP, "--accumulate", "1", "--against", "published",
             "--output", str(output)),
            60,
            page=output / "step.md",
        ),
        Part(
            "calibrate",
            (*megavideo, "calibrate", "--output", str(output / "hardware.yaml")),
            40,
        ),
    ]  # fmt: skip


def run(part: Part, output: Path) -> Outcome:
    """Run a part, its words going to OUTPUT/NAME.log; nothing of it is left running."""
    if part.missing:
        return Outcome(part, f"left out: {part.missing}", 0.0, failed=False)
    started = time.monotonic()
    with open(output / f"{part.name}.log", "wb") as log:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=os.environ | part.environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status = process.wait(60 * part.minutes)
            said = f"failed with status {status}" if status else "ok"
        except subprocess.TimeoutExpired:
            said = f"stopped after {part.minutes:g} minutes"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(part, said, (time.monotonic() - started) / 60, failed=said != "ok")


def run_all(todo: Sequence[Part], output: Path) -> Iterator[Outcome]:
    """Each part in turn, told on the terminal; of one that fails, the end of its log."""
    for part in todo:
        print(f"{part.name}: {shown(part)}", flush=True)
        outcome = run(part, output)
        print(f"{part.name}: {outcome.said} ({outcome.minutes:.1f} minutes)", flush=True)
        if outcome.failed:
            log = (output / f"{part.name}.log").read_text(errors="replace")
            print("".join(f"    {line}\n" for line in log.splitlines()[-15:]), flush=True)
        yield outcome


def shown(part: Part) -> str:
    """The part as a line for a shell."""
    settings = [f"{name}={value}" for name, value in part.environment.items()]
    return shlex.join([*settings, *part.command])


def summary(device: str, outcomes: Sequence[Outcome]) -> str:
    """Markdown: what became of each part, then the tables that they left."""
    lines = [
        f"# {device}, {datetime.now(UTC):%Y-%m-%d}",
        "",
        "| part | outcome | minutes | log |",
        "| --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        name = outcome.part.name
        log = "" if outcome.part.missing else f"[{name}.log]({name}.log)"
        lines.append(f"| {name} | {outcome.said} | {outcome.minutes:.1f} | {log} |")
    for outcome in outcomes:
        page = outcome.part.page
        if page is not None and not outcome.failed:
            lines += ["", page.read_text().strip().replace("# ", "## ", 1)]
    return "\n".join(lines) + "\n"


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder for results")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    if arguments.dry_run:
        print("\n".join(shown(part) for part in parts(output, "compute-sanitizer")))
        return 0

    import torch  # Takes seconds, and a dry run does not need it.

    if not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} finds no CUDA device here, and `make gpu` measures "
            "one; `make test` runs everywhere",
            file=sys.stderr,
        )
        return 2
    output.mkdir(parents=True, exist_ok=True)
    todo = parts(output, find_sanitizer())
    outcomes: list[Outcome] = []
    for outcome in run_all(todo, output):  # Written each time: who stops early has the rest.
        outcomes.append(outcome)
        (output / "summary.md").write_text(summary(torch.cuda.get_device_name(), outcomes))
    print(f"wrote {output / 'summary.md'}")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
