"""Nothing with a meaning in a shell gets into one: hostfiles, exports, arguments, templates."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from megavideo.launch.hostfile import Launch, Node, exports, quoted, read_hostfile, without
from megavideo.launch.kubernetes import Wishes, render
from megavideo.launch.safe import host_name, plain

K8S = Path(__file__).parents[3] / "launch" / "k8s"


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_a_hostfile_is_read_with_comments_and_blank_lines(tmp_path: Path) -> None:
    path = hostfile(
        tmp_path, "# ours\n\nn1 slots=8\nn2.rack-3  slots=4  # half\n10.0.0.7 slots=1\n"
    )
    assert read_hostfile(path) == [Node("n1", 8), Node("n2.rack-3", 4), Node("10.0.0.7", 1)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("n1;reboot slots=8", "'n1;reboot' is no host name"),
        ("$(reboot) slots=8", "is no host name"),
        ("-oProxyCommand=x slots=8", "is no host name"),
        ("n1 slots=8;id", "is not of the form"),
        ("n1 slots=0", "slots=0 must lie in 1..64"),
        ("n1", "is not of the form `node1 slots=8`"),
        ("n1 slots=8 max=9", "is not of the form"),
        ("n1 slots=８", "is not of the form"),  # a full-width digit
        ("n1 slots=8\nn1 slots=8", "n1 comes twice"),
        ("# nothing", "names no host"),
    ],
)
def test_a_wrong_line_is_refused_with_its_place(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(ValueError, match="hosts") as error:
        read_hostfile(hostfile(tmp_path, line))
    assert words in str(error.value)


def test_a_hostfile_that_is_no_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_bytes(b"n1 slots=2\nn\xf6rd slots=2\n")
    with pytest.raises(ValueError, match=r"hosts:2: .* is no host name"):
        read_hostfile(tmp_path / "hosts")


def test_a_lost_host_is_left_out_and_a_wrong_name_is_not_ignored() -> None:
    nodes = [Node("n1", 8), Node("n2", 8)]
    assert without(nodes, ["n2"]) == [Node("n1", 8)]
    with pytest.raises(ValueError, match="--exclude n3"):
        without(nodes, ["n3"])
    with pytest.raises(ValueError, match="leaves no host"):
        without(nodes, ["n1", "n2"])


def test_exported_values_are_checked_also_those_that_deepspeed_adds() -> None:
    environment = {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "4", "SECRET": "x y", "HOME": "/h"}
    assert exports(["OMP_NUM_THREADS"], environment) == {
        "NCCL_DEBUG": "WARN",
        "OMP_NUM_THREADS": "4",
    }
    with pytest.raises(ValueError, match=r"NCCL_DEBUG='\$\(id\)': '\$' has a meaning in a shell"):
        exports([], {"NCCL_DEBUG": "$(id)"})
    with pytest.raises(ValueError, match="'%' has a meaning in a shell or to pdsh"):
        exports(["LOG"], {"LOG": "%h.log"})
    with pytest.raises(ValueError, match="is no variable's name"):
        exports(["A B"], {"A B": "1"})


@given(st.text(max_size=12))
def test_what_is_plain_means_itself_in_a_shell(value: str) -> None:
    try:
        plain(value, "value")
    except ValueError:
        return
    assert not value or shlex.quote(value) == value


def test_arguments_survive_a_remote_shell() -> None:
    words = ["train", "a.yaml", "--set", "recipe.frame_rates=[1.0,2.0]", "x'y", "$(id);`id`", "*"]
    words += ["runs/%n-%h", "100%"]
    by_pdsh = {"%h": "host", "%n": "0", "%u": "user", "%%": "%"}
    given = " ".join(quoted(word) for word in words)
    line = "printf '%s\\n' " + re.sub("%.", lambda found: by_pdsh[found[0]], given)
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == words
    for lost in ("a b", ""):
        with pytest.raises(ValueError, match="cannot pass on white space"):
            quoted(lost)


def test_the_runner_inherits_nothing_that_it_would_export() -> None:
    launch = Launch([Node("n1", 2)], {"OMP_NUM_THREADS": "1"}, None, 20001, ["train"])
    environment = launch.environment({"PYTHONPATH": "x", "NCCL_X": "y", "HOME": "/h"}, "/t/exports")
    assert environment == {"HOME": "/h", "DS_ENV_FILE": "/t/exports"}
    assert launch.export_file() == "OMP_NUM_THREADS=1\n"
    assert launch.hostfile() == "n1 slots=2\n"


@pytest.mark.parametrize("name", ["a_b", "", "-a", "a" * 254, "a..b", "a\n"])
def test_no_host_name(name: str) -> None:
    with pytest.raises(ValueError, match="is no host name"):
        host_name(name, "here")


WISHES = Wishes("run-1", 4, 8, "registry.example/megavideo:2", "disk", ["train", "a: [b", "$(id)"])


def test_a_jobset_has_a_pod_for_each_node_and_starts_all_again() -> None:
    tree = YAML(typ="safe", pure=True).load(render(K8S / "jobset.yaml", WISHES))
    (replicated,) = tree["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    assert job["backoffLimit"] == 0 and tree["spec"]["failurePolicy"]["maxRestarts"] > 0
    (container,) = job["template"]["spec"]["containers"]
    assert "--rdzv-endpoint=run-1-node-0-0.run-1:29500" in container["args"]
    check_container(container)


def test_a_pytorchjob_has_a_master_and_the_others() -> None:
    tree = YAML(typ="safe", pure=True).load(render(K8S / "pytorchjob.yaml", WISHES))
    replicas = tree["spec"]["pytorchReplicaSpecs"]
    assert (replicas["Master"]["replicas"], replicas["Worker"]["replicas"]) == (1, 3)
    # The operator counts restarts of all pods together.
    assert tree["spec"]["runPolicy"]["backoffLimit"] == 4 * 20
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert "--rdzv-endpoint=run-1-master-0:29500" in container["args"]
        check_container(container)
    alone = Wishes("run-1", 1, 0, "megavideo", "disk", ["train"])
    tree = YAML(typ="safe", pure=True).load(render(K8S / "pytorchjob.yaml", alone))
    assert list(tree["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def check_container(container: dict) -> None:
    assert container["image"] == WISHES.image
    assert container["command"] == ["launch/node.sh"]
    assert container["args"][-5:] == ["-m", "megavideo", "train", "a: [b", "$$(id)"]
    assert {"--nnodes=4", "--nproc-per-node=8"} <= set(container["args"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/data"}
    # A stopped run must be no success, or Kubernetes would take it for done.
    (variable,) = container["env"]
    assert variable["name"] == "MEGAVIDEO_STOPPED_STATUS" and int(variable["value"]) > 0


@pytest.mark.parametrize(
    "wrong", [{"name": "Run_1"}, {"claim": "a: b"}, {"image": "x; y"}, {"name": "a" * 41}]
)
def test_names_that_kubernetes_refuses_are_refused_here(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is no"):
        Wishes(**{**vars(WISHES), **wrong})
