"""The processes of a run: joining them, and agreeing among them."""

import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megavideo.config.deepspeed import check_world
from megavideo.config.schema import ParallelConfig
from megavideo.parallel.mesh import Mesh

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all, and its place on the mesh of parallel axes."""

    rank: int
    size: int
    device: torch.device
    mesh: Mesh = field(default_factory=Mesh.single)

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over the data-parallel replicas, on the CPU."""
        values = values.to(self.device, copy=True)
        if self.mesh.dp.size > 1:
            dist.all_reduce(values, group=self.mesh.dp.group)
        return values.cpu()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; all get the same answer."""
        flags = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(flags)
        return bool(flags > 0)

    def gathered(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on all ranks."""
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def problem(self, function: Callable[[], object]) -> str | None:
        """Call `function` on every rank; what went wrong on the first that failed, told to all."""
        mine = None
        try:
            function()
        except (ValueError, OSError) as error:
            mine = str(error)
        problems = [text for text in self.gathered(mine) if text is not None]
        return problems[0] if problems else None

    def together(self, function: Callable[[], object]) -> None:
        """Call `function` on every rank.

        Raises:
            ValueError: on rank 0, if it failed on any. That ends the world, as in `from_rank_zero`.
        """
        problem = self.problem(function)
        if problem is not None:
            self._end()
            if self.rank == 0:
                raise ValueError(problem)
            sys.exit(2)

    def from_rank_zero(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 only and give its result to every rank.

        Raises:
            Whatever `function` raised, on rank 0. That ends the world: the other ranks exit with
            status 2, so that a user's mistake is told once.
        """
        outcome: list[tuple[bool, T | None]] = [(False, None)]
        error = None
        if self.rank == 0:
            try:
                outcome = [(True, function())]
            except Exception as caught:  # raised below, once the other ranks know
                error = caught
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        succeeded, result = outcome[0]
        if not succeeded:
            self._end()
        if error is not None:
            raise error
        if not succeeded:
            sys.exit(2)
        return result  # type: ignore[return-value]

    def first_on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0, then on the others: a mistake is told once, a cache is filled
        once. Each rank gets its own result.
        """
        own: list[T] = []
        self.from_rank_zero(lambda: own.append(function()))
        return own[0] if own else function()

    def _end(self) -> None:
        """Leave the others, before an exit that they all know of.

        Rank 0 leaves last, once it has said why: leaving takes NCCL seconds, and as soon as another
        has ended torchrun ends those that are left.
        """
        if self.size > 1:  # left alone, gloo's threads sometimes abort the exit
            if self.rank == 0:
                atexit.register(dist.destroy_process_group)
            else:
                dist.destroy_process_group()


def join_world(timeout_minutes: float, parallel: ParallelConfig | None = None) -> World:
    """Join the processes that torchrun started, or be a world of one without it.

    Args:
        timeout_minutes: longest wait for another rank before a collective fails.
        parallel: the layout; without it every process is a data-parallel rank.

    Raises:
        ValueError: if the layout needs another number of processes, or there are too few GPUs.
    """
    device = _device()
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        _limit_waits(timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1
            )
    layout = parallel or ParallelConfig()
    world = World(dist.get_rank(), dist.get_world_size(), device)
    world.from_rank_zero(lambda: check_world(layout, world.size))
    return replace(world, mesh=Mesh.build(layout.pp, layout.tp))


def _limit_waits(timeout: timedelta) -> None:
    """Every process group made from now on has this timeout unless it asks for another.

    DeepSpeed makes groups of its own, and asks for none: with torch's default a lost node would go
    unnoticed for 30 minutes (10 with NCCL), whatever the configuration says.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise ValueError(
            f"this machine's process {local} has no GPU of its own, it sees {count}; start "
            f"--nproc-per-node {count}, or let each process see all GPUs (CUDA_VISIBLE_DEVICES)"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device
