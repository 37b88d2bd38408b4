"""The launchers: dry runs start nothing, signals reach the workers once, values are checked."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[3] / "launch"
# Stands for the interpreter: as torchrun it starts a worker that saves when it is told to stop.
TORCHRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$SEEN"
bash -c 'trap "echo told >>$SEEN; sleep 0.3; exit \\$STATUS" TERM; echo working >>"$SEEN"
    while :; do sleep 0.02; done' &
trap 'echo "torchrun was told" >>"$SEEN"; exit 1' TERM INT USR1
wait $!
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in show) echo node1 ;; requeue) echo "requeued $2" >>"$SEEN" ;; esac
"""


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """What the stand-ins write; their folder is the file's."""
    for name, text in (("python", TORCHRUN), ("srun", SRUN), ("scontrol", SCONTROL)):
        script = tmp_path / name
        script.write_text(text)
        script.chmod(0o755)
    return tmp_path / "seen"


def environment(seen: Path, **more: str) -> dict[str, str]:
    own = {
        "SEEN": str(seen),
        "STATUS": "0",
        "MEGAVIDEO_PYTHON": str(seen.parent / "python"),
        "PATH": f"{seen.parent}:{os.environ['PATH']}",
    }
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MEGAVIDEO", "SLURM"))}
    return inherited | own | more


def hears_all_signals() -> None:
    """A shell's background job is deaf to Ctrl-C, `nohup`'s to SIGHUP; no trap changes that."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def start(seen: Path, *line: str, **more: str) -> subprocess.Popen[bytes]:
    """Start a launcher and wait for its worker."""
    process = subprocess.Popen([*line], env=environment(seen, **more), preexec_fn=hears_all_signals)
    end = time.monotonic() + 20
    while not (seen.exists() and "working" in seen.read_text()):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, "0"),
        (signal.SIGTERM, "143"),
        (signal.SIGINT, "0"),
        (signal.SIGUSR1, "0"),
        (signal.SIGHUP, "0"),
    ],
)
def test_a_signal_reaches_the_worker_whose_status_is_kept(
    seen: Path, number: signal.Signals, status: str
) -> None:
    process = start(seen, str(LAUNCH / "local.sh"), "train", "a.yaml", STATUS=status)
    process.send_signal(number)
    assert process.wait(60) == int(status)
    assert seen.read_text().splitlines()[2:] == ["told"]


def test_a_scheduler_that_repeats_itself_is_heard_once(seen: Path) -> None:
    process = start(seen, str(LAUNCH / "local.sh"), "train")
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        process.send_signal(number)
        time.sleep(0.05)
    assert process.wait(60) == 0
    assert seen.read_text().splitlines()[2:] == ["told"]


def test_slurm_requeues_what_was_stopped_in_time(seen: Path) -> None:
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
    process = start(seen, str(LAUNCH / "slurm.sbatch"), "train", "a.yaml", **job)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    command, *rest = seen.read_text().splitlines()
    assert "--nnodes 1" in command and "--rdzv-endpoint node1:21232 --rdzv-id 77.0" in command
    assert command.endswith("-m megavideo train a.yaml")
    assert rest == ["working", "told", "requeued 77"]


def test_slurm_leaves_an_array_to_its_next_task(seen: Path) -> None:
    job = {"SLURM_JOB_ID": "78", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
    more = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "3"}
    process = start(seen, str(LAUNCH / "slurm.sbatch"), "train", **job, **more)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert "--rdzv-endpoint node1:21251 --rdzv-id 78.3" in seen.read_text()
    assert "requeued" not in seen.read_text()


def test_a_failed_run_is_not_requeued(seen: Path) -> None:
    job = {"SLURM_JOB_ID": "79", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1"}
    process = start(seen, str(LAUNCH / "slurm.sbatch"), "train", **job, STATUS="1")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 1
    assert "requeued" not in seen.read_text()


DRY_RUNS = [
    ["local.sh", "--dry-run"],
    ["node.sh", "--dry-run", "--nnodes=2", "-m", "megavideo"],
    ["slurm.sbatch", "--dry-run"],
    ["hostfile.sh", "--dry-run", "HOSTFILE"],
    ["k8s.sh", "--dry-run"],
    ["k8s.sh", "--dry-run", "--kind", "pytorchjob", "--nodes", "3"],
]


@pytest.mark.parametrize("line", DRY_RUNS, ids=" ".join)
def test_a_dry_run_prints_what_would_run_and_starts_nothing(
    seen: Path, tmp_path: Path, line: list[str]
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("n1 slots=2\nn2 slots=2\n")
    script, *options = [str(hostfile) if word == "HOSTFILE" else word for word in line]
    renders = script in ("hostfile.sh", "k8s.sh")
    python = sys.executable if renders else str(seen.parent / "python")
    done = subprocess.run(
        [str(LAUNCH / script), *options, "train", "a.yaml", "--set", "a.b=[1,2]"],
        env=environment(seen, MEGAVIDEO_PYTHON=python), capture_output=True, text=True, check=True,
    )  # fmt: skip
    if script == "k8s.sh":
        assert "- a.b=[1,2]\n" in done.stdout
    else:
        command = shlex.split(done.stdout.splitlines()[-1])
        if script == "hostfile.sh":  # quoted once more, for the shell of each node
            command[-1] = shlex.split(command[-1])[0]
        assert command[-5:] == ["megavideo", "train", "a.yaml", "--set", "a.b=[1,2]"]
        assert "OMP_WAIT_POLICY=PASSIVE" in done.stdout
    assert not seen.exists(), "something was started"


MIG = "GPU 0: H100 (UUID: a)\\n  MIG 1g.10gb Device 0: (UUID: b)\\nGPU 1: H100 (UUID: c)\\n"


@pytest.mark.parametrize(
    ("nvidia_smi", "variables", "processes"),
    [
        (f"printf '{MIG}'", {}, "2"),
        (f"printf '{MIG}'", {"CUDA_VISIBLE_DEVICES": "0,1,3"}, "3"),
        (f"printf '{MIG}'", {"CUDA_VISIBLE_DEVICES": ""}, "1"),
        ("exit 9", {"MEGAVIDEO_PROCESSES": "5"}, "5"),
        ("echo no driver; exit 9", {}, "error: nvidia-smi --list-gpus: no driver; repair"),
    ],
    ids=["parts of GPUs", "some GPUs", "hidden GPUs", "said", "broken driver"],
)
def test_processes_are_as_many_as_gpus(
    seen: Path, nvidia_smi: str, variables: dict[str, str], processes: str
) -> None:
    script = seen.parent / "nvidia-smi"
    script.write_text(f"#!/usr/bin/env bash\n{nvidia_smi}\n")
    script.chmod(0o755)
    line = f"set -euo pipefail; source {LAUNCH}/env.sh; printf $MEGAVIDEO_PROCESSES"
    without = {k: v for k, v in environment(seen).items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        ["bash", "-c", line], env=without | variables, capture_output=True, text=True, check=False
    )
    assert (done.stdout + done.stderr).startswith(processes)
    assert done.returncode == (2 if "error" in processes else 0)


@pytest.mark.parametrize(
    "setting", ["OMP_NUM_THREADS=4;id", "MEGAVIDEO_PROCESSES=0", "MEGAVIDEO_INTERFACE=$(id)"]
)
def test_a_value_that_cannot_be_meant_is_refused(seen: Path, setting: str) -> None:
    name, _, value = setting.partition("=")
    done = subprocess.run(
        [str(LAUNCH / "local.sh"), "train"],
        env=environment(seen, **{name: value}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {setting}: use a value that matches")
    assert not seen.exists()


def test_every_launcher_is_strict() -> None:
    for script in [*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]:
        if script.name != "env.sh":  # sourced
            assert "set -euo pipefail" in script.read_text(), script
            assert script.stat().st_mode & 0o111, script
