"""From facts of all processes to verdicts; nothing here looks at this machine."""

from collections.abc import Callable, Sequence

from megavideo.doctor.facts import GIB, USUAL_PORT, Facts
from megavideo.doctor.verdict import Verdict, listed, odd_ones

# Every shard, memory-mapped index, worker and connection is an open file.
MIN_OPEN_FILES = 4096
# NCCL registers its buffers with the InfiniBand device, which locks their pages.
MIN_LOCKED = 64 * 2**20
# NCCL moves data between GPUs of a node through it where peer access is missing; a container's
# usual 64 MiB end in a bus error or "No space left on device" while communicators are made.
MIN_SHM = GIB


def judge(facts: Sequence[Facts]) -> list[Verdict]:
    """All verdicts that need no measurement."""
    nodes = [fact for fact in facts if fact.local_rank == 0]
    checks: tuple[Callable[[Sequence[Facts]], Verdict], ...] = (
        versions,
        open_files,
        locked_memory,
        ports,
    )
    verdicts = [check(nodes) for check in checks]
    verdicts += [gpus(facts), shared_memory(facts), *fused(nodes)]
    missing = paths(nodes)
    return verdicts + ([missing] if missing else [])


def versions(nodes: Sequence[Facts]) -> Verdict:
    """The same on all nodes, or which node differs in what."""
    differing = []
    for name in nodes[0].versions:
        by_node = {fact.node: fact.versions.get(name, "none") for fact in nodes}
        odd = odd_ones(by_node)
        usual = next((value for node, value in by_node.items() if node not in odd), "")
        differing += [f"{name} {value} on {node}, {usual} elsewhere" for node, value in odd.items()]
    if differing:
        text = f"{'; '.join(differing)}: install the same on every node"
        return Verdict("fail", "versions", text)
    return Verdict("ok", "versions", ", ".join(f"{k} {v}" for k, v in nodes[0].versions.items()))


def gpus(facts: Sequence[Facts]) -> Verdict:
    """As many and the same GPUs on all nodes, one for each process."""
    nodes = [fact for fact in facts if fact.local_rank == 0]
    processes = {n.node: sum(fact.node == n.node for fact in facts) for n in nodes}
    short = [n.node for n in nodes if n.gpus and len(n.gpus) < processes[n.node]]
    if short:
        text = f"fewer GPUs than processes on {listed(short)}: start one process a GPU"
        return Verdict("fail", "GPUs", text)
    kinds = {n.node: _gpus_in_words(n) for n in nodes}
    odd = odd_ones(kinds)
    if odd:
        usual = next(kind for node, kind in kinds.items() if node not in odd)
        text = "; ".join(f"{kind} on {node}, {usual} elsewhere" for node, kind in odd.items())
        mixed = any(n.gpus for n in nodes) and not all(n.gpus for n in nodes)
        remedy = "leave those nodes out, or repair their driver" if mixed else "the slowest decides"
        return Verdict("fail" if mixed else "warn", "GPUs", f"{text}: {remedy}")
    return Verdict("ok", "GPUs", f"{next(iter(kinds.values()))} on each of {len(nodes)} node(s)")


def _gpus_in_words(fact: Facts) -> str:
    if not fact.gpus:
        return "none, training on the CPU"
    return " + ".join(f"{fact.gpus.count(kind)} x {kind}" for kind in dict.fromkeys(fact.gpus))


def fused(nodes: Sequence[Facts]) -> list[Verdict]:
    """Which fused operators the GPUs have; a CPU needs none."""
    if not any(fact.gpus for fact in nodes):
        return [Verdict("ok", "fused ops", "not used on a CPU")]
    verdicts = [_kernels(nodes), _apex(nodes)]
    prebuilt = ", ".join(nodes[0].prebuilt) or "none"
    text = f"prebuilt: {prebuilt}; training needs none of them"
    return [*verdicts, Verdict("ok", "DeepSpeed ops", text)]


def _kernels(nodes: Sequence[Facts]) -> Verdict:
    lacking = {fact.node: fact.kernels for fact in nodes if fact.kernels}
    if not lacking:
        return Verdict("ok", "CUDA kernels", "libmegavideo loads")
    node, reason = next(iter(lacking.items()))
    text = f"attention falls back to torch, slower, on {listed(list(lacking))} ({node}: {reason})"
    return Verdict("warn", "CUDA kernels", text)


def _apex(nodes: Sequence[Facts]) -> Verdict:
    lacking = [fact.node for fact in nodes if fact.apex]
    if not lacking:
        return Verdict("ok", "apex", "FusedAdam and FusedLayerNorm are used")
    if len(lacking) < len(nodes):
        text = f"not on {listed(lacking)}: their updates round otherwise; install it there too"
        return Verdict("warn", "apex", text)
    return Verdict("ok", "apex", "not installed: torch's fused AdamW and LayerNorm are used")


def open_files(nodes: Sequence[Facts]) -> Verdict:
    """Enough files can be open."""
    low = {f.node: f.open_files for f in nodes if (f.open_files or MIN_OPEN_FILES) < MIN_OPEN_FILES}
    if not low:
        least = min((f.open_files for f in nodes if f.open_files is not None), default=None)
        return Verdict("ok", "open files", "unlimited" if least is None else f"{least:,} or more")
    text = f"only {min(low.values()):,} on {listed(list(low))}: raise `ulimit -n` to 65536"  # type: ignore[type-var]
    return Verdict("warn", "open files", text)


def locked_memory(nodes: Sequence[Facts]) -> Verdict:
    """InfiniBand's buffers can be locked."""
    low = [
        fact.node
        for fact in nodes
        if fact.infiniband and fact.locked_memory is not None and fact.locked_memory < MIN_LOCKED
    ]
    if low:
        text = (
            f"too little for InfiniBand on {listed(low)}: NCCL will fail with `ibv_reg_mr`; set "
            "`ulimit -l unlimited` (SLURM: PropagateResourceLimitsExcept=MEMLOCK)"
        )
        return Verdict("fail", "locked memory", text)
    if any(fact.infiniband for fact in nodes):
        return Verdict("ok", "locked memory", "enough for InfiniBand")
    return Verdict("ok", "locked memory", "no InfiniBand, so none is needed")


def shared_memory(facts: Sequence[Facts]) -> Verdict:
    """/dev/shm is large enough where several processes share a node's GPUs."""
    crowded = {fact.node for fact in facts if fact.local_rank > 0 and fact.gpus}
    nodes = [fact for fact in facts if fact.local_rank == 0]
    small = [fact.node for fact in nodes if fact.node in crowded and fact.shm < MIN_SHM]
    least = min(fact.shm for fact in nodes) / GIB
    if small:
        text = (
            f"/dev/shm is {least:.2f} GiB on {listed(small)}: give the container more "
            "(docker --shm-size=16g, Kubernetes an emptyDir with medium Memory)"
        )
        return Verdict("fail", "shared memory", text)
    return Verdict("ok", "shared memory", f"/dev/shm has {least:.1f} GiB")


def ports(nodes: Sequence[Facts]) -> Verdict:
    """A process can listen; and whether the usual port is somebody's."""
    none = [fact.node for fact in nodes if not fact.free_port]
    if none:
        text = f"no process can listen on any port on {listed(none)}: free some, or look at limits"
        return Verdict("fail", "ports", text)
    taken = [fact.node for fact in nodes if fact.usual_port_taken]
    if taken:
        text = (
            f"{USUAL_PORT}, the usual rendezvous port, is taken on {listed(taken)}: another job "
            "may run there; the scripts in launch/ choose another port"
        )
        return Verdict("warn", "ports", text)
    return Verdict("ok", "ports", f"free ones, {USUAL_PORT} among them")


def paths(nodes: Sequence[Facts]) -> Verdict | None:
    """Configured files are on every node; None if nothing is missing."""
    missing = {fact.node: fact.missing for fact in nodes if fact.missing}
    if not missing:
        return None
    names = next(iter(missing.values()))
    text = f"{', '.join(names)} missing on {listed(list(missing))}: {_copy_or_mount(len(nodes))}"
    return Verdict("fail", "files", text)


def _copy_or_mount(num_nodes: int) -> str:
    return "mount or copy it there" if num_nodes > 1 else "make it, or correct the path"
