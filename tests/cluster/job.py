"""A training job over several hosts, watched from outside."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megavideo.checkpoint.commit import LATEST, checkpoints_of
from megavideo.train.metrics import FILE, read_rows
from tests.cluster.demo import ROOT
from tests.cluster.hosts import INTERFACE, Cluster, Host, finish

PORT = 23456  # the hosts' network is new and their own: every port is free
# A dead torchrun is noticed after three missed signs of life; then stragglers get two seconds.
RENDEZVOUS = "keep_alive_interval=1,last_call_timeout=2"
LOST = "lost another rank"
ENVIRONMENT = {
    **os.environ,
    "MEGAVIDEO_PYTHON": sys.executable,
    "MEGAVIDEO_INTERFACE": INTERFACE,
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Job:
    """Processes of one torchrun job, one on each host, and their logs."""

    hosts: Sequence[Host]
    run: Path
    processes: list[subprocess.Popen[str]]

    def log(self, host: Host) -> str:
        """What the host has printed so far."""
        return log_file(self.run, host).read_text()

    def logs(self) -> str:
        """What all hosts have printed."""
        return "\n".join(f"{host.name}:\n{self.log(host)}" for host in self.hosts)

    def wait_for_step(self, step: int, deadline_s: float = 600) -> float:
        """Seconds until the metrics have a row of `step` or later."""
        return self._wait(lambda: max(losses(self.run), default=0) >= step, deadline_s)

    def wait_for_checkpoint(self, deadline_s: float = 600) -> None:
        """Until there is something to go on from, and a step after it, which will be done again."""
        latest = checkpoints_of(self.run) / LATEST
        self._wait(latest.exists, deadline_s)
        self.wait_for_step(max(losses(self.run)) + 1, deadline_s)

    def wait_for_loss_told(self, hosts: Sequence[Host], deadline_s: float) -> float:
        """Seconds until each of `hosts` has printed that a rank is lost."""
        return self._wait(lambda: all(LOST in self.log(host) for host in hosts), deadline_s)

    def wait_until_saved(self, deadline_s: float = 120) -> int:
        """The step at which the run was stopped, once the first host says that it is saved."""
        found: list[str] = []

        def saved() -> bool:
            log = self.log(self.hosts[0])
            found[:] = re.findall(r"saving and stopping at step (\d+)", log)
            return bool(found) and re.search(rf"saved step {found[-1]}\b", log) is not None

        self._wait(saved, deadline_s)
        return int(found[-1])

    def stop(self, place: int) -> None:
        """Send SIGTERM to launch/node.sh of the `place`-th host, as a scheduler does."""
        nsenter = self.processes[place].pid
        node = Path(f"/proc/{nsenter}/task/{nsenter}/children").read_text()
        os.kill(int(node), signal.SIGTERM)

    def finish(self, deadline_s: float = 600) -> list[int | None]:
        """Exit statuses by host, None for a host that had to be killed."""
        return finish(self.processes, deadline_s)

    def _wait(self, condition: Callable[[], bool], deadline_s: float) -> float:
        started = time.monotonic()
        while not condition():
            if time.monotonic() - started > deadline_s:
                raise AssertionError(f"nothing happened in {deadline_s} s\n{self.logs()}")
            time.sleep(0.05)
        return time.monotonic() - started


def start(
    hosts: Sequence[Host],
    nodes: str,
    files: Sequence[str],
    run: Path,
    *settings: str,
    restarts: int = 0,
    **environment: str,
) -> Job:
    """Start `megavideo train` with one process on each host, as launch/ does on each node.

    Args:
        nodes: torchrun's --nnodes, as "2" or "1:2".
    """
    run.mkdir(parents=True, exist_ok=True)
    meeting = f"--rdzv-endpoint={hosts[0].name}:{PORT}"
    options = [
        f"--nnodes={nodes}", "--nproc-per-node=1", f"--max-restarts={restarts}", meeting,
        "--rdzv-backend=c10d", f"--rdzv-id={run.name}", f"--rdzv-conf={RENDEZVOUS}",
    ]  # fmt: skip
    overrides = [f"run.directory={run}", *settings]
    train = ["train", *files, *(part for item in overrides for part in ("--set", item))]
    line = [str(ROOT / "launch" / "node.sh"), *options, "-m", "megavideo", *train]
    processes = []
    for host in hosts:
        with open(log_file(run, host), "a") as log:
            processes.append(
                host.start(*line, env=ENVIRONMENT | environment, stdout=log, stderr=log)
            )
    return Job(hosts, run, processes)


def launcher(
    cluster: Cluster, script: Sequence[str], files: Sequence[str], run: Path, **environment: str
) -> Job:
    """Start a launcher outside of the hosts, with stand-ins for ssh, pdsh, srun and scontrol."""
    run.mkdir(parents=True, exist_ok=True)
    bin_folder = Path(__file__).parent / "bin"
    tools = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "HOSTS": str(cluster.table),
        "REQUEUED": str(cluster.requeued),
    }
    command, *options = script
    train = ["train", *files, "--set", f"run.directory={run}"]
    line = [str(ROOT / "launch" / command), *options, *train]
    with open(log_file(run, cluster.hosts[0]), "a") as log:
        process = subprocess.Popen(
            line, env=ENVIRONMENT | tools | environment, cwd=ROOT, stdout=log, stderr=log, text=True
        )
    return Job(cluster.hosts[:1], run, [process])


def log_file(run: Path, host: Host) -> Path:
    return run / f"{host.name}.log"


def losses(run: Path) -> dict[int, float]:
    """The training loss of each step that has a row."""
    if not (run / FILE).exists():
        return {}
    return {int(row["step"]): row["loss"] for row in read_rows(run) if "loss" in row}
