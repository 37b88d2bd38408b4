"""What a rank's memory holds in training, in bytes: weights, gradients, optimizer, activations.

Parameters are counted one by one, each cut as its layer says; activations tensor by tensor
(activations.py). The rest follows DeepSpeed 0.19.8, element by element of what a rank trains:

                 gradients                              optimizer (AdamW), over its dp ranks
    fp32, ZeRO 0   4 g                                    8 whole
    fp32, ZeRO 1   4 g                                    4 master + 8, cut
    bf16, ZeRO 1   4 g accumulated, and 2 of a backward   4 master + 8, cut   (BF16_Optimizer)
    fp16, ZeRO 1   2 g                                    4 master + 8, cut
    ZeRO 2         accumulated, cut; one bucket           4 master + 8, cut
    ZeRO 3         as ZeRO 2; weights cut too, frozen ones included

Adding 16 to 18 bytes for every parameter, as rules of thumb do, triples the model of this project:
three quarters of it are frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from math import prod

from megavideo.config.schema import Config, ModelConfig
from megavideo.model.flops import cached_table
from megavideo.parallel.shard import part_shape
from megavideo.plan.activations import ELEMENT_BYTES, Kept, Ledger
from megavideo.plan.runs import runs_of, stages_of
from megavideo.plan.schedule import in_flight, most_in_flight, short_of

# DeepSpeed's default stage3_prefetch_bucket_size, in elements: gathered ahead of their use.
PREFETCH = 50_000_000
# Elements up to which BF16_Optimizer copies its fp32 gradients into one tensor to reduce them; a
# larger group of parameters is reduced where it is. DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE.
COPIED_TO_REDUCE = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        parameters: weights that are held (with ZeRO 3, the rank's part).
        gradients: accumulated over micro-batches.
        optimizer: master weights and moments.
        buffers: the head's copy of the word table, reduction buckets, gathered weights.
        activations: kept for backward passes to come, of all micro-batches in flight.
        working: the most that one layer's backward needs beside them and, from a step's second
            micro-batch on, the bf16 gradients of the one before; or what the reduction needs more,
            when activations are gone.
        reserve: the device's context, communication buffers and fragmentation.
    """

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    working: int
    reserve: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Held:
    """Elements of a layer's parameters on one tensor-parallel rank."""

    frozen: int
    trained: int


def layer_parameters(config: Config) -> tuple[Held, ...]:
    """Of each layer of model/build.py's list, on the tensor-parallel rank that holds most.

    Raises:
        ValueError: if a parameter cannot be cut over parallel.tp ranks.
    """
    return _layer_parameters(config.model, config.recipe.stage == "image", config.parallel.tp)


@lru_cache(maxsize=64)
def _layer_parameters(model: ModelConfig, base: bool, tp: int) -> tuple[Held, ...]:
    numbers = {"embedding": 0, "head": model.layers + 1}
    numbers |= {f"layers.{index}": index + 1 for index in range(model.layers)}
    counts = [[0, 0] for _ in numbers]
    for row in cached_table(model, base):
        elements = prod(part_shape(row.shape, row.shard, 0, tp))
        counts[numbers[row.layer]][row.trainable or base] += elements
    return tuple(Held(frozen, trained) for frozen, trained in counts)


def memory_by_stage(config: Config, dp: int, ledger: Ledger, reserve: int = 0) -> list[Memory]:
    """Of a rank of each pipeline stage.

    Args:
        dp: data-parallel replicas.
        ledger: of what the configuration's layers keep.
        reserve: bytes that are not the model's (see `Memory`).
    """
    kept = [_of_samples(k, config.recipe.micro_batch) for k in ledger.layers()]
    activations = _in_flight(config, dp, kept, ledger.boundary() * config.recipe.micro_batch)
    parameters = layer_parameters(config)
    return [
        _of_stage(
            config,
            dp,
            rank,
            [parameters[layer] for layer in layers],
            activations[rank],
            max(kept[layer].working for layer in layers),
            reserve,
        )
        for rank, layers in enumerate(stages_of(config))
    ]


def _of_samples(kept: Kept, samples: int) -> Kept:
    return Kept(kept.kept * samples, kept.working * samples)


def _of_stage(
    config: Config,
    dp: int,
    rank: int,
    own: Sequence[Held],
    activations: int,
    working: int,
    reserve: int,
) -> Memory:
    frozen, trained = sum(held.frozen for held in own), sum(held.trained for held in own)
    one_backward = _gradients_of_one_backward(config, trained)
    accumulates = config.recipe.batch > config.recipe.micro_batch * dp
    return Memory(
        parameters=_parameters(config, dp, frozen + trained),
        gradients=_gradients(config, dp, trained),
        optimizer=_optimizer(config, dp, trained),
        buffers=_buffers(config, own, rank),
        activations=activations,
        working=max(
            working + (one_backward if accumulates else 0),
            one_backward + _copied_to_reduce(config, trained) - activations,
        ),
        reserve=reserve,
    )


def _parameters(config: Config, dp: int, elements: int) -> int:
    size = ELEMENT_BYTES[config.recipe.precision]
    return -(-elements // dp) * size if config.parallel.zero == 3 else elements * size


def _gradients(config: Config, dp: int, trained: int) -> int:
    precision, zero = config.recipe.precision, config.parallel.zero
    size = 2 if precision == "fp16" else 4  # bf16 gradients are added up in fp32
    return -(-trained // dp) * size if zero >= 2 else trained * size


def _adds_up_apart(config: Config) -> bool:
    """Whether bf16 gradients stand beside the fp32 ones that they are added to: BF16_Optimizer."""
    return config.recipe.precision == "bf16" and config.parallel.zero < 2


def _gradients_of_one_backward(config: Config, trained: int) -> int:
    """What autograd leaves beside the accumulated gradients, until the step ends."""
    return 2 * trained if _adds_up_apart(config) else 0


def _copied_to_reduce(config: Config, trained: int) -> int:
    return 4 * trained if _adds_up_apart(config) and trained <= COPIED_TO_REDUCE else 0


def _optimizer(config: Config, dp: int, trained: int) -> int:
    moments = 8 if config.recipe.optimizer.name == "adamw" else 0
    if config.parallel.zero == 0:
        return moments * trained
    return (4 + moments) * -(-trained // dp)


def _buffers(config: Config, own: Sequence[Held], rank: int) -> int:
    """Buckets of a gradient reduction, gathered weights of ZeRO 3, the head's own word rows."""
    model, parallel = config.model, config.parallel
    size = ELEMENT_BYTES[config.recipe.precision]
    trained = sum(layer.trained for layer in own)
    has_buckets = parallel.zero >= 1 and not _adds_up_apart(config)
    bucket = min(parallel.reduce_bucket, trained) * size if has_buckets else 0
    if parallel.zero == 3:
        widest = max(layer.frozen + layer.trained for layer in own)
        bucket += (widest + min(PREFETCH, sum(h.frozen + h.trained for h in own))) * size
    copies = (parallel.tp > 1 or parallel.pp > 1) and config.recipe.stage != "image"
    if copies and rank == parallel.pp - 1:
        bucket += -(-model.image_codes // parallel.tp) * model.hidden * size
    return bucket


def _in_flight(config: Config, dp: int, kept: Sequence[Kept], sent: int) -> list[int]:
    """Activations of each rank's micro-batches whose backward pass is to come, at the worst moment.

    Args:
        sent: bytes that a run sends on, kept with what its layers keep.
    """
    parallel, recipe = config.parallel, config.recipe
    of_run = [sum(kept[layer].kept for layer in run) for run in runs_of(config)]
    if parallel.pp == 1:
        return of_run
    steps = short_of(parallel.pp, recipe.batch // (recipe.micro_batch * dp))
    moments = in_flight(parallel.pp, parallel.virtual_stages, steps)
    with_sent = [size + sent for size in of_run]
    return [most_in_flight(m, with_sent[rank :: parallel.pp]) for rank, m in enumerate(moments)]
