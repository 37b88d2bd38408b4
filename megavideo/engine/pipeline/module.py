"""The layers of one pipeline rank, as DeepSpeed's PipelineModule."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from megavideo.config.schema import Config
from megavideo.engine.pipeline.cut import pack, unpack
from megavideo.engine.quiet import deepspeed, hushed
from megavideo.engine.weights import new_layers
from megavideo.engine.world import World
from megavideo.layout.grid import Grid
from megavideo.log import log
from megavideo.model.build import stage_grid
from megavideo.model.partition import describe_stages, partition, runs_of_rank
from megavideo.parallel.mesh import Mesh


class PipelineLayers(deepspeed.PipelineModule):
    """The runs of layers that this rank holds; one of them, the active one, is its forward pass.

    Children are named by their number in the whole list. Recomputation lies in the blocks, so
    DeepSpeed's, which would read the active run too late, stays off.

    Args:
        layers: the whole list, with memory for this rank's layers only.
        runs: numbers of the layers of each run, of all ranks.
        grid: of a sample.

    Attributes:
        runs: this rank's.
        active: which of them `forward` computes.
        before_forward: called with the number of the run, among all, before each training forward.
    """

    def __init__(self, layers: Sequence[nn.Module], runs: Sequence[range], grid: Grid, mesh: Mesh):
        self.num_runs = len(runs)
        self.runs = runs_of_rank(runs, mesh.pp.rank, mesh.pp.size)
        self.active = 0
        self.before_forward: Callable[[int], None] = lambda run: None
        self.all_layers: list[Any] = list(layers)  # a list: only what this rank holds is a child
        self._all_runs = list(runs)
        self._grid_of_sample = grid
        super().__init__(layers, topology=_topology(mesh))

    def forward(self, inputs: Any) -> Any:
        """Of the active run: a batch or packed streams in, packed streams or logits out."""
        run = self.runs[self.active]
        number = self._all_runs.index(run)
        if self.training:
            self.before_forward(number)
        states = unpack(inputs, self._grid_of_sample) if number else inputs
        for layer in run:
            states = self.all_layers[layer](states)
        return states if number == self.num_runs - 1 else pack(states)

    def _partition_layers(self, method: str = "ours") -> None:
        self.parts = [0, *(run.stop for run in self._all_runs)]

    def _build(self) -> None:
        for run in self.runs:
            self._set_bounds(run.start, run.stop)
            super()._build()


def new_pipeline_model(config: Config, world: World) -> PipelineLayers:
    """This rank's layers on its device, values not set yet."""
    runs = partition(config.model, config.recipe, config.parallel)
    if world.rank == 0:
        stages = describe_stages(config.model, config.recipe, config.parallel)
        log.info("pipeline: %s", " | ".join(stages))
    held = [n for run in runs_of_rank(runs, world.mesh.pp.rank, world.mesh.pp.size) for n in run]
    layers = new_layers(config, world.device, held, world.mesh)
    with hushed():
        deepspeed.init_distributed(dist_init_required=False)
        grid = stage_grid(config.model, config.recipe.stage)
        return PipelineLayers(layers, runs, grid, world.mesh)


def _topology(mesh: Mesh) -> Any:
    """DeepSpeed's description of the mesh: it numbers ranks in the same order."""
    return deepspeed.runtime.pipe.topology.PipeModelDataParallelTopology(
        num_pp=mesh.pp.size, num_mp=mesh.tp.size, num_dp=mesh.dp.size
    )
