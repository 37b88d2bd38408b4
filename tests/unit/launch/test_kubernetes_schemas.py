"""What launch/k8s.sh sends is what Kubernetes, JobSet and the training operator take.

Pods and jobs are held against Kubernetes' own schemas, every unknown field refused. Those of the
custom resources are the few that the templates use, from the projects' Go types:
kubernetes-sigs/jobset api/jobset/v1alpha2/jobset_types.go and
kubeflow/training-operator pkg/apis/kubeflow.org/v1/{common,pytorch}_types.go.
"""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kubernetes_validate.utils import all_versions
from ruamel.yaml import YAML

from megavideo.launch.kubernetes import Wishes, render

K8S = Path(__file__).parents[3] / "launch" / "k8s"
VERSIONS = [all_versions()[0], all_versions()[-1]]  # what the package brings: 1.25 to 1.37
POD, JOB = object(), object()  # stand for what Kubernetes' own schemas describe

JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": JOB}],
    },
}
REPLICAS = {
    "replicas": int,
    "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template": POD,
}
PYTORCHJOB = {
    "apiVersion": {"kubeflow.org/v1"},
    "kind": {"PyTorchJob"},
    "metadata": {"name": str},
    "spec": {
        "runPolicy": {
            "cleanPodPolicy": {"All", "Running", "None"},
            "backoffLimit": int,
            "activeDeadlineSeconds": int,
            "ttlSecondsAfterFinished": int,
        },
        "nprocPerNode": str,
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}
KINDS = {"jobset": JOBSET, "pytorchjob": PYTORCHJOB}


def rendered(kind: str, nodes: int, gpus: int) -> Any:
    wishes = Wishes("run-1", nodes, gpus, "registry.example/megavideo:2", "disk", ["train", "a"])
    return YAML(typ="safe", pure=True).load(render(K8S / f"{kind}.yaml", wishes))


def check(value: Any, allowed: Any, path: str = "") -> None:
    """Raise ValueError at the first field that is unknown or of a wrong type."""
    if allowed is POD or allowed is JOB:
        check_with_kubernetes(value, path, "Pod" if allowed is POD else "Job")
    elif isinstance(allowed, dict):
        for name, inner in value.items():
            if name not in allowed:
                raise ValueError(f"{path}.{name}: unknown")
            check(inner, allowed[name], f"{path}.{name}")
    elif isinstance(allowed, list):
        for number, inner in enumerate(value):
            check(inner, allowed[0], f"{path}[{number}]")
    elif value not in allowed if isinstance(allowed, set) else type(value) is not allowed:
        raise ValueError(f"{path}={value!r}: none of {allowed}")


def check_with_kubernetes(template: Any, path: str, kind: str) -> None:
    """A template is an object without its head; `strict` refuses unknown fields."""
    head = {"apiVersion": "v1" if kind == "Pod" else "batch/v1", "kind": kind}
    for version in VERSIONS:
        try:
            kubernetes_validate.validate({**head, **template}, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = ".".join(map(str, error.path))
            raise ValueError(f"{path}.{place}: {error.message} ({version})") from None


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 0), (13, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_kubernetes_takes_what_is_sent(kind: str, nodes: int, gpus: int) -> None:
    check(rendered(kind, nodes, gpus), KINDS[kind])


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("jobset", "spec/network/enableDnsHostnames", True),
        ("jobset", "spec/replicatedJobs/0/template/spec/completionmode", "Indexed"),
        ("jobset", "spec/replicatedJobs/0/template/spec/template/spec/volumes/0/emptydir", {}),
        ("jobset", "spec/failurePolicy/maxRestarts", "20"),
        ("pytorchjob", "spec/runPolicy/cleanPodPolicy", None),
        ("pytorchjob", "spec/pytorchReplicaSpecs/Worker/template/spec/containers/0/args", "a b"),
        ("pytorchjob", "spec/pytorchReplicaSpecs/Master/restartPolicy", "Sometimes"),
    ],
)
def test_a_field_that_is_wrong_is_found(kind: str, path: str, value: Any) -> None:
    """The checks above would notice."""
    tree = rendered(kind, 2, 8)
    *places, last = path.split("/")
    inner = tree
    for place in places:
        inner = inner[int(place) if place.isdigit() else place]
    inner[last] = value
    with pytest.raises(ValueError, match=r"^\.spec"):
        check(tree, KINDS[kind])
