"""Hosts on one machine: each has its own network, processes, name and /etc/hosts; files are shared.

A host is a set of Linux namespaces that lives as long as one idle process in it. All hosts hang on
one bridge, which has namespaces of its own, so that nothing of the machine's network is touched and
nothing is left behind, even when the program that made them is killed.
"""

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

NETWORK = "10.77.0"  # only ever seen inside the namespaces
INTERFACE = "eth0"


def not_permitted() -> str | None:
    """Why hosts cannot be made here, None if they can."""
    line = ["unshare", "--net", "ip", "link", "add", "br0", "type", "bridge"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return f"network namespaces need {error.filename}"
    return f"network namespaces: {done.stderr.strip()}" if done.returncode else None


@dataclass(frozen=True)
class Host:
    """One host.

    Attributes:
        pid: of the idle process that keeps its namespaces.
    """

    name: str
    address: str
    pid: int

    def line(self, *command: str) -> list[str]:
        """The command line that runs `command` on this host, in the caller's folder."""
        namespaces = ["--net", "--uts", "--pid", "--mount"]
        return ["nsenter", f"--target={self.pid}", *namespaces, f"--wd={os.getcwd()}", *command]

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Run `command` on this host without waiting for it."""
        return subprocess.Popen(self.line(*command), text=True, **options)

    def shape(self, rate: str) -> None:
        """Let this host send no faster than `rate`, in tc's words, as "200mbit"."""
        bucket = ["tbf", "rate", rate, "burst", "256kb", "latency", "100ms"]
        line = ["tc", "qdisc", "add", "dev", INTERFACE, "root", *bucket]
        subprocess.run(self.line(*line), check=True)

    def die(self) -> None:
        """Kill every process of this host at once; the kernel closes its connections."""
        os.kill(self.pid, 9)


class Cluster:
    """`count` hosts named h1, h2, ... on one switch, until the `with` block ends."""

    def __init__(self, count: int):
        self._count = count
        self.hosts: list[Host] = []

    def __enter__(self) -> "Cluster":
        self._folder = tempfile.TemporaryDirectory(prefix="megavideo-hosts-")
        self._keepers: list[subprocess.Popen[bytes]] = []
        try:
            self._switch = self._namespaces("switch")
            self._on_switch("link", "add", "br0", "type", "bridge")
            self._on_switch("link", "set", "br0", "up")
            for number in range(1, self._count + 1):
                self.hosts.append(self._host(number))
            lines = [f"{host.name} {host.pid}\n" for host in self.hosts]
            self.table.write_text("".join(lines))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for keeper in self._keepers:
            keeper.kill()  # its child, and with it the whole host, dies with it
        for keeper in self._keepers:
            keeper.wait()
        self._folder.cleanup()

    @property
    def table(self) -> Path:
        """A file with name and pid of each host, for the stand-ins in bin/."""
        return Path(self._folder.name) / "table"

    @property
    def requeued(self) -> Path:
        """Where the stand-in of scontrol writes the jobs that it was asked to requeue."""
        return Path(self._folder.name) / "requeued"

    def unplug(self, host: Host) -> None:
        """Pull the host's cable: nothing arrives any more, and no connection is closed."""
        self._on_switch("link", "set", host.name, "down")

    def _host(self, number: int) -> Host:
        name, address = f"h{number}", f"{NETWORK}.{number}"
        pid = self._namespaces(name)
        ends = ["type", "veth", "peer", "name", INTERFACE, "netns", str(pid)]
        self._on_switch("link", "add", name, *ends)
        self._on_switch("link", "set", name, "master", "br0", "up")
        for device in ("lo", INTERFACE):
            _ip(pid, "link", "set", device, "up")
        _ip(pid, "address", "add", f"{address}/24", "dev", INTERFACE)
        return Host(name, address, pid)

    def _namespaces(self, name: str) -> int:
        """Start the idle process of a host; its pid once its namespaces are ready."""
        names = Path(self._folder.name) / "names"
        lines = [f"{NETWORK}.{n} h{n}\n" for n in range(1, self._count + 1)]
        names.write_text("127.0.0.1 localhost\n" + "".join(lines))
        ready = Path(self._folder.name) / f"{name}.ready"
        setup = 'hostname "$1"; mount --bind "$2" /etc/hosts; : >"$3"; exec sleep infinity'
        own = ["--net", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
        line = ["setpriv", "--pdeathsig", "KILL", "unshare", *own]
        inside = ["sh", "-euc", setup, "sh", name, str(names), str(ready)]
        with open(Path(self._folder.name) / f"{name}.log", "w") as log:
            keeper = subprocess.Popen([*line, *inside], stdin=subprocess.DEVNULL, stderr=log)
        self._keepers.append(keeper)
        _wait_for(ready, keeper)
        children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text()
        return int(children)

    def _on_switch(self, *arguments: str) -> None:
        _ip(self._switch, *arguments)


def _ip(pid: int, *arguments: str) -> None:
    line = ["nsenter", f"--target={pid}", "--net", "ip", *arguments]
    subprocess.run(line, check=True)


def _wait_for(path: Path, process: subprocess.Popen[Any], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"a host did not start: {path.stem}")
        time.sleep(0.01)


def finish(processes: Sequence[subprocess.Popen[Any]], deadline_s: float) -> list[int | None]:
    """Wait for all to end; their statuses. What still runs after `deadline_s` is killed: None."""
    end = time.monotonic() + deadline_s
    statuses: list[int | None] = []
    for process in processes:
        try:
            statuses.append(process.wait(max(0.0, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            statuses.append(None)
    return statuses
