"""What a configuration would take on described hardware: seconds of a step, memory, utilisation."""

from dataclasses import dataclass

from megavideo.config.deepspeed import accumulation_steps, check_schedule, check_world
from megavideo.config.schema import Config
from megavideo.model.flops import Execution, executed_flops, naive_flops, training_flops
from megavideo.plan.activations import ELEMENT_BYTES, Ledger
from megavideo.plan.hardware import Hardware
from megavideo.plan.memory import Memory, memory_by_stage
from megavideo.plan.runs import runs_of, stages_of
from megavideo.plan.schedule import Bar, ideal_seconds, pipeline_seconds, timeline
from megavideo.plan.time import (
    TILES,
    LayerTimes,
    Machine,
    Seconds,
    checkpoint_bytes,
    reduction,
    trained_and_held,
)

GIB = 2**30
# Share of ZeRO 3's gathering of weights that is not hidden behind the layer before, on a GPU, where
# it could be. An assumption.
EXPOSED = 0.25


@dataclass(frozen=True)
class Prediction:
    """Of one training step.

    Attributes:
        step_s: seconds, checkpoints' share included.
        parts: seconds that add up to `step_s`; compute is the busiest stage's.
        memory: of a rank of each pipeline stage.
        mfu, mfu_6n, hfu: utilisations as in model/flops.py, of `peak_tflops` a device.
        samples: of a step.
    """

    step_s: float
    parts: dict[str, float]
    memory: list[Memory]
    mfu: float
    mfu_6n: float
    hfu: float
    peak_tflops: float
    samples: int

    @property
    def fullest(self) -> Memory:
        """The memory of the fullest rank."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def limit(self) -> tuple[str, float]:
        """The part that costs most beside forward and backward themselves, and its share."""
        others = {name: s for name, s in self.parts.items() if name not in ("forward", "backward")}
        name = max(others, key=lambda part: others[part])
        return name, others[name] / self.step_s


def predict(config: Config, world_size: int, hardware: Hardware) -> Prediction:
    """Predict a training step of `config` on `world_size` devices.

    Raises:
        ValueError: if the layout, the batch or the precision does not fit, as training would.
    """
    return Predictor(hardware).predict(config, world_size)


class Predictor:
    """Predictions on one machine; what layouts share is computed once."""

    def __init__(self, hardware: Hardware):
        self.hardware = hardware
        self._layers: dict[tuple[object, ...], list[Seconds]] = {}
        self._flops: dict[tuple[object, ...], dict[str, int]] = {}

    def predict(self, config: Config, world_size: int, exact: bool = True) -> Prediction:
        """As the function `predict`.

        Args:
            exact: go through a pipeline's schedule action by action; otherwise take its length from
                a formula, which is a hundred times faster.
        """
        hardware, dp = self.hardware, replicas(config, world_size)
        parts = self._parts(config, dp, exact)
        step_s = sum(parts.values())
        peak = hardware.peak_tflops[config.recipe.precision]
        return Prediction(
            step_s=step_s,
            parts=parts,
            memory=self._memory(config, dp),
            **self._utilisations(config, step_s * world_size * peak * 1e12),
            peak_tflops=peak,
            samples=config.recipe.batch,
        )

    def fullest(self, config: Config, world_size: int) -> int:
        """Bytes of the fullest rank's memory."""
        return max(memory.total for memory in self._memory(config, replicas(config, world_size)))

    def timeline(self, config: Config, world_size: int) -> list[Bar]:
        """When each pipeline stage computes which micro-batch."""
        dp, parallel = replicas(config, world_size), config.parallel
        machine = self._machine(config, dp)
        passes = self._passes(config, machine)
        steps = accumulation_steps(config.recipe, dp)
        return timeline(parallel.pp, steps, *passes, machine.send(_boundary(config)))

    def _memory(self, config: Config, dp: int) -> list[Memory]:
        ledger = Ledger(config, self.hardware.attention, self.hardware.kind == "gpu")
        return memory_by_stage(config, dp, ledger, int(self.hardware.reserve_gib * GIB))

    def _machine(self, config: Config, dp: int) -> Machine:
        return Machine(self.hardware, config.parallel.tp, dp, config.parallel.pp)

    def _layer_times(self, config: Config, machine: Machine) -> list[Seconds]:
        parallel = config.parallel
        shared = (parallel.tp, parallel.sequence_parallel, parallel.recompute)
        key = (config.model, config.recipe, *shared)
        if key not in self._layers:
            self._layers[key] = LayerTimes(config, self.hardware, machine).layers()
        return self._layers[key]

    def _passes(self, config: Config, machine: Machine) -> tuple[list[float], list[float]]:
        """Seconds forward and backward of each run of layers."""
        layers, runs = self._layer_times(config, machine), runs_of(config)
        program = self.hardware.overhead.micro_batch_ms * 1e-3 / 2 / len(runs)
        forward = [sum(layers[n].all_forward for n in run) + program for run in runs]
        backward = [sum(layers[n].all_backward for n in run) + program for run in runs]
        return forward, backward

    def _utilisations(self, config: Config, available: float) -> dict[str, float]:
        """Shares of the FLOPs that all devices could do in a step."""
        model, recipe, recompute = config.model, config.recipe, config.parallel.recompute
        key = (model, recipe.stage, recipe.window, recompute)
        if key not in self._flops:
            execution = Execution(TILES[self.hardware.attention], recompute)
            self._flops[key] = {
                "mfu": training_flops(model, recipe),
                "mfu_6n": naive_flops(model, recipe),
                "hfu": executed_flops(model, recipe, execution),
            }
        return {name: f * recipe.batch / available for name, f in self._flops[key].items()}

    def _parts(self, config: Config, dp: int, exact: bool) -> dict[str, float]:
        """The busiest stage's compute, then everything that it waits for."""
        machine, pp = self._machine(config, dp), config.parallel.pp
        steps = accumulation_steps(config.recipe, dp)
        layers = self._layer_times(config, machine)
        stages = [[layers[n] for n in stage] for stage in stages_of(config)]
        busiest = max(stages, key=lambda stage: sum(x.all_forward + x.all_backward for x in stage))
        compute = {
            "forward": steps * sum(layer.forward for layer in busiest),
            "backward": steps * sum(layer.backward for layer in busiest),
            "recompute": steps * sum(layer.recomputed for layer in busiest),
            "tensor parallel": steps * sum(layer.tp + layer.tp_backward for layer in busiest),
        }
        program = steps * self.hardware.overhead.micro_batch_ms * 1e-3 / pp
        passes = self._passes(config, machine)
        length = pipeline_seconds if exact else ideal_seconds
        pipeline = length(pp, steps, *passes, machine.send(_boundary(config)))
        waiting = max(0.0, pipeline - sum(compute.values()) - program) if pp > 1 else 0.0
        return compute | {"pipeline": waiting} | self._after(config, machine, compute, program)

    def _after(
        self, config: Config, machine: Machine, compute: dict[str, float], program: float
    ) -> dict[str, float]:
        """What replicas exchange, the optimizer, and what is not arithmetic."""
        steps = accumulation_steps(config.recipe, machine.dp)
        trained, held = max(trained_and_held(config))
        done = reduction(config, machine, trained, held, steps)
        weights = done.weights
        if config.parallel.zero == 3 and self.hardware.kind == "gpu":
            weights = max(EXPOSED * weights, weights - sum(compute.values()))
        every = config.run.save_every or config.recipe.steps
        saving = checkpoint_bytes(config) / (self.hardware.disk_gb_per_s * 1e9)
        return {
            "reduction": done.gradients + weights,
            "optimizer": done.optimizer,
            "program": program + self.hardware.overhead.step_ms * 1e-3,
            "checkpoints": saving / every,
        }


def replicas(config: Config, world_size: int) -> int:
    """Data-parallel replicas.

    Raises:
        ValueError: if the layout, the batch or the schedule cannot be.
    """
    if config.parallel.offload_optimizer:
        raise ValueError(
            "parallel.offload_optimizer=true cannot be predicted: no hardware profile says how "
            "fast a host's optimizer is; set parallel.offload_optimizer=false"
        )
    check_world(config.parallel, world_size)
    dp = world_size // (config.parallel.pp * config.parallel.tp)
    check_schedule(config.parallel, accumulation_steps(config.recipe, dp))
    return dp


def _boundary(config: Config) -> float:
    """Bytes of the states that one stage sends to the next."""
    parallel, recipe = config.parallel, config.recipe
    cut = parallel.tp if parallel.sequence_parallel else 1
    slots = config.model.grid.sequence * recipe.micro_batch
    return slots * config.model.hidden * ELEMENT_BYTES[recipe.precision] / cut
