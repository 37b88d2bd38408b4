"""Fill in a Kubernetes template of launch/k8s/ for one run; launch/k8s.sh calls this.

The template is read as data and written as data: no value can become YAML of its own, nothing
passes through a shell, neither here nor in the pod, and Kubernetes finds no variable to expand.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from megavideo.cli import run

# A pod has an address of its own, so every port of it is free.
PORT = 29500
# Kubernetes builds pod names from it, with suffixes, and 63 characters is the limit of a label.
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
IMAGE = re.compile(r"[a-z0-9][a-zA-Z0-9._/:@-]*")


@dataclass(frozen=True)
class Wishes:
    """What a template is filled in with.

    Attributes:
        arguments: of the `megavideo` command in every pod.
    """

    name: str
    nodes: int
    gpus: int
    image: str
    claim: str
    arguments: Sequence[str]

    def __post_init__(self) -> None:
        for option, value in (("--name", self.name), ("--claim", self.claim)):
            if not NAME.fullmatch(value):
                raise ValueError(
                    f"{option}={value!r} is no name for Kubernetes; use at most 40 lowercase "
                    "letters, digits and inner hyphens, a letter first"
                )
        if not IMAGE.fullmatch(self.image):
            raise ValueError(f"--image={self.image!r} is no image, as registry.example/a/b:tag")


def render(template: Path, wishes: Wishes) -> str:
    """The template as YAML with `wishes` in it.

    Raises:
        ValueError: if it is neither a JobSet nor a PyTorchJob.
    """
    tree = YAML(typ="safe", pure=True).load(template)
    # A copy in which nothing is shared: the template's anchors are resolved.
    tree = json.loads(json.dumps(tree))
    tree["metadata"]["name"] = wishes.name
    kind = tree.get("kind")
    if kind == "JobSet":
        _fill_jobset(tree["spec"], wishes)
    elif kind == "PyTorchJob":
        _fill_pytorchjob(tree["spec"], wishes)
    else:
        raise ValueError(f"{template}: kind {kind!r} is neither JobSet nor PyTorchJob")
    return _dump(tree)


def _fill_jobset(spec: Any, wishes: Wishes) -> None:
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    job["parallelism"] = job["completions"] = wishes.nodes
    meeting = f"{wishes.name}-{replicated['name']}-0-0.{wishes.name}"
    _fill_pod(job["template"]["spec"], meeting, wishes)


def _fill_pytorchjob(spec: Any, wishes: Wishes) -> None:
    # The operator adds up restarts over all pods, and one that is lost makes each start again.
    spec["runPolicy"]["backoffLimit"] *= wishes.nodes
    replicas = spec["pytorchReplicaSpecs"]
    for replica in replicas.values():
        _fill_pod(replica["template"]["spec"], f"{wishes.name}-master-0", wishes)
    if wishes.nodes > 1:
        replicas["Worker"]["replicas"] = wishes.nodes - 1
    else:
        del replicas["Worker"]


def _fill_pod(pod: Any, meeting: str, wishes: Wishes) -> None:
    (container,) = pod["containers"]
    container["image"] = wishes.image
    container["args"] = _torchrun(meeting, wishes)
    limits = container["resources"]["limits"]
    if wishes.gpus:
        limits["nvidia.com/gpu"] = wishes.gpus
    else:
        del limits["nvidia.com/gpu"]
    (claim,) = [v["persistentVolumeClaim"] for v in pod["volumes"] if "emptyDir" not in v]
    claim["claimName"] = wishes.claim


def _torchrun(meeting: str, wishes: Wishes) -> list[str]:
    return [
        f"--nnodes={wishes.nodes}",
        f"--nproc-per-node={wishes.gpus or 1}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={meeting}:{PORT}",
        f"--rdzv-id={wishes.name}",
        # Kubernetes makes $(NAME) the variable's value and $$ a dollar sign.
        *("-m", "megavideo", *(argument.replace("$", "$$") for argument in wishes.arguments)),
    ]


def _dump(tree: Any) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    stream = StringIO()
    yaml.dump(tree, stream)
    return stream.getvalue()


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--name", default="megavideo", show_default=True, help="Of the job.")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--gpus", type=click.IntRange(0), default=8, show_default=True, help="Of each node.")
@click.option("--image", default="megavideo", show_default=True, help="Has MegaVideo installed.")
@click.option("--claim", default="megavideo", show_default=True, help="Volume claim for /data.")
@click.argument("template", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(template: Path, **wishes: Any) -> None:
    """Print TEMPLATE filled in for a run of `megavideo ARGUMENTS`."""
    if not template.is_file():
        raise FileNotFoundError(f"no template {template}; launch/k8s/ has them")
    sys.stdout.write(render(template, Wishes(**wishes)))


if __name__ == "__main__":
    run(main)
