"""Start a run over the nodes of a hostfile, by DeepSpeed's runner; launch/hostfile.sh calls this.

The runner writes host names, exported values, the current folder and all arguments unquoted into a
line for pdsh. So each of them is checked or quoted here, and the runner gets an environment in
which nothing else is exported.
"""

import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from megavideo.cli import run
from megavideo.launch.safe import host_name, plain, variable

# Below the ports that Linux gives to outgoing connections (32768 and more): none is in the way.
PORTS = range(20000, 30000)
# What DeepSpeed 0.19.8 exports by itself, by the beginning of the name.
EXPORTED_BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
MAX_SLOTS = 64


@dataclass(frozen=True)
class Node:
    """A line of a hostfile: a host and how many processes it runs."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Node]:
    """The nodes of a hostfile: a line is `NAME slots=N`, or empty, or a comment after `#`.

    Raises:
        ValueError: with file, line and remedy, if a line is anything else or a host comes twice.
    """
    nodes: list[Node] = []
    # No host name has other letters than ASCII: what is wrong is told with its line.
    for number, line in enumerate(path.read_text("ascii", "replace").splitlines(), 1):
        text = line.partition("#")[0].strip()
        if text:
            nodes.append(_node(text, f"{path}:{number}"))
    names = [node.name for node in nodes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: {twice[0]} comes twice; give each host one line")
    if not nodes:
        raise ValueError(f"{path} names no host; write a line such as `node1 slots=8` for each")
    return nodes


def _node(text: str, place: str) -> Node:
    name, _, slots = text.partition(" ")
    key, _, count = slots.strip().partition("=")
    if key != "slots" or not (count.isascii() and count.isdigit()):
        raise ValueError(f"{place}: {text!r} is not of the form `node1 slots=8`")
    if not 1 <= int(count) <= MAX_SLOTS:
        raise ValueError(f"{place}: slots={count} must lie in 1..{MAX_SLOTS}")
    return Node(host_name(name, place), int(count))


def without(nodes: Sequence[Node], excluded: Sequence[str]) -> list[Node]:
    """The nodes that are not excluded. Raises: ValueError if a name is unknown, or none is left."""
    unknown = sorted(set(excluded) - {node.name for node in nodes})
    if unknown:
        raise ValueError(f"--exclude {unknown[0]}: the hostfile has no such host")
    left = [node for node in nodes if node.name not in excluded]
    if not left:
        raise ValueError("--exclude leaves no host")
    return left


def exports(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables to set on every node: `names`, and what DeepSpeed would export anyway.

    Raises:
        ValueError: if a value has a character that a shell acts on.
    """
    anyway = [name for name in environment if name.startswith(EXPORTED_BY_DEEPSPEED)]
    return {
        variable(name): plain(environment[name], name)
        for name in sorted({*names, *anyway})
        if name in environment
    }


def quoted(argument: str) -> str:
    """`argument` as pdsh must read it to give it to the remote shell.

    Raises:
        ValueError: if it has white space, around which the runner puts quotes of its own, or is
            nothing at all, which the runner loses.
    """
    if not argument or any(character.isspace() for character in argument):
        raise ValueError(
            f"argument {argument!r}: DeepSpeed's runner cannot pass on white space; put the value "
            "into a YAML file, or rename the file"
        )
    return shlex.quote(argument).replace("%", "%%")  # of which pdsh makes one


@dataclass(frozen=True)
class Launch:
    """A command line of DeepSpeed's runner, and the files it reads."""

    nodes: Sequence[Node]
    exports: Mapping[str, str]
    master: str | None
    port: int
    arguments: Sequence[str]

    def hostfile(self) -> str:
        """The checked hosts, in DeepSpeed's words."""
        return "".join(f"{node.name} slots={node.slots}\n" for node in self.nodes)

    def export_file(self) -> str:
        """The checked variables, a line each: what DeepSpeed reads as DS_ENV_FILE."""
        return "".join(f"{name}={value}\n" for name, value in self.exports.items())

    def command(self, hostfile: str) -> list[str]:
        """The runner's command line; `--force_multi`, so that one host is reached as many are."""
        master = [f"--master_addr={self.master}"] if self.master else []
        return [
            *(plain(sys.executable, "the interpreter"), "-m", "deepspeed.launcher.runner"),
            *(f"--hostfile={hostfile}", f"--master_port={self.port}", *master, "--force_multi"),
            *("--no_local_rank", "--module", "megavideo"),
            *(quoted(argument) for argument in self.arguments),
        ]

    def environment(self, inherited: Mapping[str, str], export_file: str) -> dict[str, str]:
        """The runner's own environment, in which it finds nothing to export but `export_file`."""
        kept = {
            name: value
            for name, value in inherited.items()
            if not name.startswith(EXPORTED_BY_DEEPSPEED)
        }
        return kept | {"DS_ENV_FILE": export_file}


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--dry-run", is_flag=True, help="Print files, environment and command; start nothing."
)
@click.option("--export", "names", multiple=True, help="Variable to set on every node.")
@click.option("--exclude", multiple=True, help="Host to leave out, as one that was lost.")
@click.option("--master", help="Address of the first host; otherwise ssh asks it.")
@click.argument("hostfile", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(
    dry_run: bool,
    names: tuple[str, ...],
    exclude: tuple[str, ...],
    master: str | None,
    hostfile: Path,
    arguments: tuple[str, ...],
) -> None:
    """Run `megavideo ARGUMENTS` over the hosts of HOSTFILE."""
    plain(os.getcwd(), "the current folder")
    launch = Launch(
        without(read_hostfile(hostfile), exclude),
        exports(names, os.environ),
        host_name(master, "--master") if master else None,
        random.SystemRandom().choice(PORTS),
        arguments,
    )
    if dry_run:
        click.echo(_describe(launch))
    else:
        sys.exit(_run(launch))


def _describe(launch: Launch) -> str:
    command = shlex.join(launch.command("HOSTFILE"))
    lines = [f"# HOSTFILE: {line}" for line in launch.hostfile().splitlines()]
    lines += [f"# on each node: {line}" for line in launch.export_file().splitlines()]
    return "\n".join([*lines, command])


def _run(launch: Launch) -> int:
    with tempfile.TemporaryDirectory(prefix="megavideo-launch-") as name:
        hosts, variables = Path(name, "hosts"), Path(name, "exports")
        hosts.write_text(launch.hostfile())
        variables.write_text(launch.export_file())
        environment = launch.environment(os.environ, str(variables))
        runner = subprocess.Popen(launch.command(str(hosts)), env=environment)
        for number in (signal.SIGTERM, signal.SIGINT):
            # The runner then sends SIGTERM to the workers of every node, which save and end.
            signal.signal(number, lambda number, frame: runner.send_signal(number))
        return runner.wait()


if __name__ == "__main__":
    run(main)
