"""What a process finds out about its node without talking to any other."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash

from megavideo import __version__
from megavideo.engine.quiet import prebuilt_ops
from megavideo.ops import library

GIB = 2**30
# torchrun's and DeepSpeed's own default: two jobs that both take it meet each other.
USUAL_PORT = 29500


@dataclass(frozen=True)
class Facts:
    """One process's node.

    Attributes:
        node: its name, the same for all processes of a node.
        group: the node's number, as the launcher says it.
        versions: by package; megavideo's with a digest of its source.
        gpus: name and memory of each, as this process sees them.
        apex, kernels: why NVIDIA's apex and our CUDA library cannot be used; None if they can.
        locked_memory, open_files: soft limits; None is unlimited.
        shm: size of /dev/shm in bytes, 0 if there is none.
        infiniband: whether the node has InfiniBand or RoCE devices.
        free_port: whether a process could listen on a port that the system chose.
        usual_port_taken: whether somebody listens on port 29500.
        missing: of the asked paths, those that do not exist here.
    """

    rank: int
    local_rank: int
    node: str
    group: int
    versions: dict[str, str]
    gpus: tuple[str, ...]
    apex: str | None
    kernels: str | None
    prebuilt: tuple[str, ...]
    locked_memory: int | None
    open_files: int | None
    shm: int
    infiniband: bool
    free_port: bool
    usual_port_taken: bool
    missing: tuple[str, ...]


def collect(paths: tuple[str, ...] = ()) -> Facts:
    """The facts of this process's node; which of `paths` exist on it is one of them."""
    return Facts(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        node=socket.gethostname(),
        group=int(os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or 0),
        versions=versions(),
        gpus=_gpus(),
        apex=_apex(),
        kernels=_kernels(),
        prebuilt=prebuilt_ops(),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        open_files=_limit(resource.RLIMIT_NOFILE),
        shm=_shm(),
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        free_port=_can_listen(0),
        usual_port_taken=not _can_listen(USUAL_PORT),
        missing=tuple(path for path in paths if not Path(path).exists()),
    )


def with_own_names(facts: Sequence[Facts]) -> list[Facts]:
    """Containers may all have one host name: then the node's number tells them apart."""
    numbers: dict[str, set[int]] = {}
    for fact in facts:
        numbers.setdefault(fact.node, set()).add(fact.group)
    return [
        replace(fact, node=f"{fact.node}#{fact.group}") if len(numbers[fact.node]) > 1 else fact
        for fact in facts
    ]


def versions() -> dict[str, str]:
    """What must be equal on all nodes for the same computation everywhere."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "deepspeed": importlib.metadata.version("deepspeed"),
        "megavideo": f"{__version__} ({_source_digest()[:8]})",
    }
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _source_digest() -> str:
    """Of all Python files of the package: nodes may hold different checkouts of one version."""
    package = Path(__file__).parents[1]
    digest = xxhash.xxh3_128()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _gpus() -> tuple[str, ...]:
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(f"{gpu.name} {gpu.total_memory / GIB:.0f} GiB" for gpu in found)


def _apex() -> str | None:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:  # also where `apex` is PyPI's package of that name
        return str(error)
    assert FusedAdam
    return None


def _kernels() -> str | None:
    """Builds the library where there is a GPU and none is built yet, as training would."""
    if not torch.cuda.is_available():
        return "no GPU"
    try:
        library.load()
    except library.LibraryError as error:
        return str(error).splitlines()[0]
    return None


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _shm() -> int:
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0


def _can_listen(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
            listener.listen(1)
        except OSError:
            return False
    return True
