"""MegaVideo over several hosts made of network namespaces: it trains, loses a host, and goes on.

Usage: python -m tests.cluster.netns [SCENARIO...]      (as root; about six minutes on two cores)

Trains the demo's model for a few steps, with each launcher, losing hosts in several ways; compares
every loss with that of an unbroken run in one process, and prints a table of figures. Scenarios:
two four dies vanishes rendezvous stopped hostfile slurm doctor interface. The status is 1 if
anything is wrong.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.demo import ROOT, make_demo
from tests.cluster.hosts import Cluster, finish, not_permitted
from tests.cluster.job import ENVIRONMENT, Job, launcher, losses, start

STEPS, SAVE_EVERY = 10, 3  # as the settings of tests.cluster.demo say
TIMEOUT_S = 15.0
# Sums in another order; losses are about 5.5.
TOLERANCE = 2e-5


@dataclass
class Bench:
    """What the scenarios share.

    Attributes:
        expected: the losses of an unbroken run.
        table: (scenario, figure, value), in the order they were found.
    """

    folder: Path
    files: list[str]
    expected: dict[int, float] = field(default_factory=dict)
    table: list[tuple[str, str, str]] = field(default_factory=list)

    def note(self, scenario: str, figure: str, value: str) -> None:
        """Keep a figure for the table, and print it now."""
        self.table.append((scenario, figure, value))
        print(f"{scenario:34} {figure:44} {value}", flush=True)

    def check_losses(self, scenario: str, run: Path) -> None:
        """Every step has been done, with the losses of the unbroken run."""
        found = losses(run)
        assert set(found) == set(self.expected), f"{scenario}: steps {sorted(found)}"
        error = max(abs(found[step] - loss) for step, loss in self.expected.items())
        self.note(scenario, f"largest error of {len(found)} losses", f"{error:.1e}")
        assert error < TOLERANCE, f"{scenario}: other samples, or another computation"


def check_ended(job: Job, statuses: Sequence[int | None], expected: Sequence[int | None]) -> None:
    """Statuses are as expected; else show what was printed."""
    assert list(statuses) == list(expected), f"exit statuses {statuses}\n{job.logs()}"


def check_saved(job: Job) -> int:
    """The step at which a run stopped, which it must have saved."""
    step = job.wait_until_saved()
    assert SAVE_EVERY < step < STEPS, f"stopped at step {step}"
    return step


def one_process(bench: Bench) -> None:
    """The unbroken run that all others are compared with."""
    with Cluster(1) as cluster:
        run = bench.folder / "one"
        job = start(cluster.hosts, "1", bench.files, run)
        check_ended(job, job.finish(), [0])
    bench.expected = losses(run)
    assert sorted(bench.expected) == list(range(1, STEPS + 1))
    bench.note("1 host", "steps", str(STEPS))


def trains(bench: Bench, count: int) -> None:
    """An undisturbed run over `count` hosts."""
    scenario = f"{count} hosts"
    with Cluster(count) as cluster:
        job = start(cluster.hosts, str(count), bench.files, bench.folder / f"hosts-{count}")
        bench.note(scenario, "seconds to the first step", f"{job.wait_for_step(1):.1f}")
        seconds = job.wait_for_step(STEPS) / (STEPS - 1)
        bench.note(scenario, "seconds a step", f"{seconds:.2f}")
        check_ended(job, job.finish(), [0] * count)
    bench.check_losses(scenario, job.run)


def host_dies(bench: Bench) -> None:
    """Two hosts, the second's processes are killed: the first goes on alone by itself."""
    scenario = "2 hosts, one dies"
    with Cluster(2) as cluster:
        first, second = cluster.hosts
        job = start(cluster.hosts, "1:2", bench.files, bench.folder / "dies", restarts=1)
        job.wait_for_checkpoint()
        second.die()
        noticed = job.wait_for_loss_told([first], TIMEOUT_S)
        bench.note(scenario, "seconds until it is noticed", f"{noticed:.1f}")
        again = job.wait_for_step(STEPS)
        bench.note(scenario, "more seconds until 1 host has done the rest", f"{again:.1f}")
        check_ended(job, job.finish(), [0, -9])
    assert f"resumed {job.run}/checkpoints/step-" in job.log(first)
    bench.check_losses(scenario, job.run)


def host_vanishes(bench: Bench) -> None:
    """Four hosts, the fourth's cable is pulled: nothing says so but the timeout; three go on."""
    scenario = "4 hosts, one is unplugged"
    with Cluster(4) as cluster:
        *left, lost = cluster.hosts
        job = start(cluster.hosts, "3:4", bench.files, bench.folder / "vanishes", restarts=1)
        job.wait_for_checkpoint()
        cluster.unplug(lost)
        noticed = job.wait_for_loss_told(left, 2 * TIMEOUT_S)
        bench.note(scenario, f"seconds until noticed, timeout {TIMEOUT_S:.0f} s", f"{noticed:.1f}")
        again = job.wait_for_step(STEPS)
        bench.note(scenario, "more seconds until 3 hosts have done the rest", f"{again:.1f}")
        statuses = job.finish(deadline_s=90)
        check_ended(job, statuses[:3], [0, 0, 0])
        assert statuses[3] != 0, "the lost host must not report success"
    bench.check_losses(scenario, job.run)


def meeting_place_dies(bench: Bench) -> None:
    """Two hosts; the one where all meet dies. The same command on the other host goes on."""
    scenario = "2 hosts, the rendezvous dies"
    with Cluster(2) as cluster:
        first, second = cluster.hosts
        job = start(cluster.hosts, "1:2", bench.files, bench.folder / "meeting", restarts=1)
        job.wait_for_checkpoint()
        first.die()
        noticed = job.wait_for_loss_told([second], TIMEOUT_S)
        bench.note(scenario, "seconds until it is noticed", f"{noticed:.1f}")
        status = job.finish()[1]
        assert status not in (0, None), "without a rendezvous torchrun must give up"
        job = start([second], "1", bench.files, job.run)
        check_ended(job, job.finish(), [0])
    bench.check_losses(scenario, job.run)


def node_is_preempted(bench: Bench) -> None:
    """Two hosts, one is told to stop: all save and end; the same command goes on.

    As in a pod: no host may report success then, or Kubernetes would take the run for done.
    """
    scenario = "2 hosts, one is told to stop"
    run, pod = bench.folder / "preempted", {"MEGAVIDEO_STOPPED_STATUS": "143"}
    with Cluster(2) as cluster:
        job = start(cluster.hosts, "2", bench.files, run, **pod)
        job.wait_for_checkpoint()
        job.stop(1)
        check_ended(job, job.finish(), [1, 1])  # torchrun's status where a worker's is not 0
        bench.note(scenario, "saved at step", str(check_saved(job)))
        job = start(cluster.hosts, "2", bench.files, run, **pod)
        check_ended(job, job.finish(), [0, 0])
    bench.check_losses(scenario, run)


def by_hostfile(bench: Bench) -> None:
    """launch/hostfile.sh over two hosts; told to stop, it saves, and goes on without one host."""
    scenario = "hostfile.sh, 2 hosts"
    hostfile = bench.folder / "hosts"
    hostfile.write_text("h1 slots=1\nh2 slots=1\n")
    run = bench.folder / "hostfile"
    with Cluster(2) as cluster:
        job = launcher(cluster, ["hostfile.sh", str(hostfile)], bench.files, run)
        job.wait_for_checkpoint()
        job.processes[0].terminate()
        # DeepSpeed's runner ends with 1 at once; the workers have 30 s from then.
        assert job.finish() == [1], job.logs()
        bench.note(scenario, "told to stop, saved at step", str(check_saved(job)))
        more = ["--exclude", "h2", str(hostfile)]
        job = launcher(cluster, ["hostfile.sh", *more], bench.files, run)
        check_ended(job, job.finish(), [0])
    bench.check_losses(scenario, run)


def by_slurm(bench: Bench) -> None:
    """launch/slurm.sbatch over two hosts; before its time limit it saves and is requeued."""
    scenario = "slurm.sbatch, 2 hosts"
    run = bench.folder / "slurm"
    allocation = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "h1,h2",
        "SLURM_SUBMIT_DIR": str(ROOT), "MEGAVIDEO_PROCESSES": "1",
    }  # fmt: skip
    with Cluster(2) as cluster:
        job = launcher(cluster, ["slurm.sbatch"], bench.files, run, **allocation)
        job.wait_for_checkpoint()
        job.processes[0].send_signal(signal.SIGUSR1)
        check_ended(job, job.finish(), [0])
        assert cluster.requeued.read_text() == "4711\n"
        bench.note(scenario, "SIGUSR1, requeued after step", str(check_saved(job)))
        again = {**allocation, "SLURM_RESTART_COUNT": "1"}
        job = launcher(cluster, ["slurm.sbatch"], bench.files, run, **again)
        check_ended(job, job.finish(), [0])
        assert cluster.requeued.read_text() == "4711\n", "a run that is done is not requeued"
    bench.check_losses(scenario, run)


def doctor_examines(bench: Bench) -> None:
    """`megavideo doctor` over three hosts with two processes each, one of them on a slow link."""
    scenario = "doctor, 3 hosts x 2, h3 slow"
    node = [str(ROOT / "launch" / "node.sh"), "--nnodes=3", "--nproc-per-node=2"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=h1:23456"]
    command = ["-m", "megavideo", "doctor", f"--directory={bench.folder}"]
    with Cluster(3) as cluster:
        for host, rate in zip(cluster.hosts, ("400mbit", "400mbit", "40mbit"), strict=True):
            host.shape(rate)
        first, *others = [
            host.start(*node, *meeting, *command, env=ENVIRONMENT, stdout=subprocess.PIPE)
            for host in cluster.hosts
        ]
        report, _ = first.communicate(timeout=240)
        assert [first.returncode, *finish(others, 60)] == [0, 0, 0], report
    for line in report.splitlines():
        print(f"    {line}")
    (link,) = [line for line in report.splitlines() if "between nodes" in line]
    assert link.startswith("warn") and "slow: h3 to h1" in link, report
    bench.note(scenario, "verdict on links", link[20:])


def doctor_sees_nobody(bench: Bench) -> None:
    """Two hosts whose interface leads nowhere: they say so, with status 1."""
    scenario = "doctor, wrong interface"
    node = [str(ROOT / "launch" / "node.sh"), "--nnodes=2", "--nproc-per-node=2"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=h1:23456"]
    command = ["-m", "megavideo", "doctor", f"--directory={bench.folder}", "--timeout=15"]
    wrong = {**ENVIRONMENT, "MEGAVIDEO_INTERFACE": "lo"}
    with Cluster(2) as cluster:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        started = time.monotonic()
        doctors = [
            host.start(*node, *meeting, *command, env=wrong, **pipes) for host in cluster.hosts
        ]
        reports = [doctor.communicate(timeout=300)[0] for doctor in doctors]
        bench.note(scenario, "seconds until told", f"{time.monotonic() - started:.1f}")
    assert [doctor.returncode for doctor in doctors] == [1, 1], reports
    told = [report for report in reports if "fail  rendezvous     rank" in report]
    assert told, reports
    bench.note(scenario, "hosts that say so", str(len(told)))


SCENARIOS: dict[str, Callable[[Bench], None]] = {
    "two": lambda bench: trains(bench, 2),
    "four": lambda bench: trains(bench, 4),
    "dies": host_dies,
    "vanishes": host_vanishes,
    "rendezvous": meeting_place_dies,
    "stopped": node_is_preempted,
    "hostfile": by_hostfile,
    "slurm": by_slurm,
    "doctor": doctor_examines,
    "interface": doctor_sees_nobody,
}


def main() -> None:
    """Run the scenarios that are named, or all; print the table."""
    reason = not_permitted()
    if reason:
        sys.exit(reason)
    names = sys.argv[1:] or list(SCENARIOS)
    unknown = set(names) - set(SCENARIOS)
    if unknown:
        sys.exit(f"error: no scenario {sorted(unknown)}; there are {', '.join(SCENARIOS)}")
    with tempfile.TemporaryDirectory(prefix="megavideo-netns-") as place:
        folder = Path(place)
        bench = Bench(folder, make_demo(folder / "data"))
        one_process(bench)
        for name in names:
            SCENARIOS[name](bench)
    print("\n| scenario | figure | value |\n|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in bench.table))


if __name__ == "__main__":
    main()
