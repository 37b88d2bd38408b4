"""Where each rank stands on the mesh, and that its groups join the right ranks."""

import torch
import torch.distributed as dist

from megavideo.parallel.mesh import Axis, Mesh
from tests.world import run_world


def test_a_single_process_is_alone_on_every_axis() -> None:
    mesh = Mesh.single()
    for axis in (mesh.pp, mesh.dp, mesh.tp):
        assert axis == Axis() and axis.is_first


def test_each_axis_joins_the_ranks_that_share_the_other_coordinates() -> None:
    run_world(_check_eight, 8)


def _check_eight(rank: int) -> None:
    mesh = Mesh.build(pp=2, tp=2)
    assert rank == (mesh.pp.rank * 2 + mesh.dp.rank) * 2 + mesh.tp.rank
    expected = {
        "tp": {rank, rank ^ 1},
        "dp": {rank, rank ^ 2},
        "pp": {rank, rank ^ 4},
    }
    for name, ranks in expected.items():
        axis = getattr(mesh, name)
        assert set(axis.ranks) == ranks and axis.ranks[axis.rank] == rank
        total = torch.tensor(2**rank)
        dist.all_reduce(total, group=axis.group)
        assert total == sum(2**member for member in ranks)
