"""Seconds of a training step in a layout, part by part, on described hardware.

Compute: every matrix product by its shape, attention by executed tiles, pointwise operations by the
bytes they move, programs by their own time (beside it on a GPU, before it on a CPU). Communication
by messages and bytes over the slowest link that a group crosses, with ring algorithms; nothing is
assumed to be hidden but most of what ZeRO 3 gathers (predict.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal

from megavideo.config.schema import Config, ModelConfig
from megavideo.layout.rules import loss_frames
from megavideo.model.build import stage_grid
from megavideo.model.execution import TILES
from megavideo.model.flops import Execution, block_work, cached_table
from megavideo.model.recompute import SPANS, Sublayer, computed_again
from megavideo.plan.activations import ELEMENT_BYTES
from megavideo.plan.hardware import Hardware, Link, Rate
from megavideo.plan.memory import layer_parameters
from megavideo.plan.runs import stages_of

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Product:
    """One linear layer's matrix product: [rows, depth] x [depth, columns], on one rank."""

    rows: int
    columns: int
    depth: int
    input_gradient: bool
    weight_gradient: bool


@dataclass(frozen=True)
class Seconds:
    """Of one micro-batch through one layer, on one rank."""

    forward: float
    backward: float
    recomputed: float = 0.0
    tp: float = 0.0
    tp_backward: float = 0.0

    @property
    def all_forward(self) -> float:
        return self.forward + self.tp

    @property
    def all_backward(self) -> float:
        return self.backward + self.recomputed + self.tp_backward


class Machine:
    """Times of what ranks do, laid out over nodes as parallel/mesh.py numbers them."""

    def __init__(self, hardware: Hardware, tp: int, dp: int, pp: int):
        self.hardware = hardware
        self.tp, self.dp, self.pp = tp, dp, pp

    def all_reduce(self, size: int, stride: int, payload: float) -> float:
        """Seconds of a ring all-reduce of `payload` bytes, which goes round twice."""
        return 2 * self._ring(lambda link: link, size, stride, payload)

    def all_gather(self, size: int, stride: int, payload: float) -> float:
        """Seconds until each rank has all `payload` bytes, of which it had an equal share."""
        return self._ring(lambda link: link.all_gather or link, size, stride, payload)

    def reduce_scatter(self, size: int, stride: int, payload: float) -> float:
        """Seconds until each rank has its share of the sums of `payload` bytes."""
        return self._ring(lambda link: link.reduce_scatter or link, size, stride, payload)

    def _ring(
        self, rate_of: Callable[[Link], Rate], size: int, stride: int, payload: float
    ) -> float:
        """Once round `size` ranks, `stride` apart. Members on a node share the node's ways out, so
        that a ring with several members on each node has several.
        """
        if size == 1:
            return 0.0
        hardware = self.hardware
        rate = rate_of(hardware.node_link)
        speed = rate.gb_per_s
        if size * stride > hardware.devices_per_node:
            rate = rate_of(hardware.network)
            speed = min(speed, max(1, hardware.devices_per_node // stride) * rate.gb_per_s)
        steps = size - 1
        return steps * rate.latency_us * 1e-6 + payload * steps / size / (speed * 1e9)

    def send(self, payload: float) -> float:
        """Seconds from a pipeline stage to the next."""
        away = self.dp * self.tp >= self.hardware.devices_per_node
        link = self.hardware.network if away else self.hardware.node_link
        return link.latency_us * 1e-6 + payload / (link.gb_per_s * 1e9)


class LayerTimes:
    """Times of a model's layers on one tensor-parallel rank, each computed once."""

    def __init__(self, config: Config, hardware: Hardware, machine: Machine):
        self.config, self.hardware, self.machine = config, hardware, machine
        self.parallel = config.parallel
        self.grid = stage_grid(config.model, config.recipe.stage)
        self.samples = config.recipe.micro_batch
        self.element = ELEMENT_BYTES[config.recipe.precision]
        self.base_trains = config.recipe.stage == "image"

    def layers(self) -> list[Seconds]:
        """Of each layer of model/build.py's list."""
        blocks = self.config.model.layers
        # Odd and even blocks differ (shifted windows), and the last of a trained base.
        kinds = [(index % 2, index == blocks - 1) for index in range(blocks)]
        by_kind = {kind: self._block(kinds.index(kind)) for kind in dict.fromkeys(kinds)}
        return [self._embedding(), *(by_kind[kind] for kind in kinds), self._head()]

    def products(self, sublayer: Sublayer) -> list[Product]:
        """The linear layers of half a block."""
        h, tp, trained = self.config.model.hidden, self.parallel.tp, self.base_trains
        text, images = (self.samples * n for n in (self.grid.text, self.grid.image_tokens))
        if sublayer == "mlp":
            shapes = [(4 * h // tp, h), (h, 4 * h // tp)]
        else:
            shapes = [(3 * h // tp, h), (h, h // tp)]
        found = [Product(text, *shape, trained, trained) for shape in shapes]
        found += [Product(images, *shape, True, trained) for shape in shapes]
        if sublayer == "attention" and not trained:
            found += [Product(images, *shape, True, True) for shape in shapes]
            found.append(Product(text, 2 * h // tp, h, False, True))
        return found

    def _block(self, layer: int) -> Seconds:
        forward = {name: self._device(name, layer, "forward") for name in PROGRAM_SHARE}
        backward = {name: self._device(name, layer, "backward") for name in PROGRAM_SHARE}
        overhead, recompute = self.hardware.overhead, self.parallel.recompute
        again = [span.sublayers for span in SPANS[recompute] if span.again]
        differentiated = self.grid.sequence if self.base_trains else self.grid.image_tokens
        region = self._region(self.grid.sequence)
        return Seconds(
            self._with_program(forward, overhead.layer_forward_ms),
            self._with_program(backward, overhead.layer_backward_ms),
            sum(
                self._with_program({s: forward[s] for s in span}, overhead.layer_forward_ms)
                for span in again
            ),
            len(forward) * region,
            len(forward) * self._region(differentiated) + len(computed_again(recompute)) * region,
        )

    def _device(self, sublayer: Sublayer, layer: int, direction: Direction) -> float:
        """Seconds of half a block's arithmetic."""
        seconds = sum(self._product(product, direction) for product in self.products(sublayer))
        if sublayer == "attention":
            seconds += self._attention(layer, direction)
        return seconds + self._pointwise(sublayer, direction)

    def _embedding(self) -> Seconds:
        """Looking up words and positions, and summing over ranks what each has of the words."""
        states = self.samples * self.grid.sequence * self.config.model.hidden * self.element
        forward = 4 * states / self.hardware.bytes_per_s("copy")
        return Seconds(forward, forward / 2, 0.0, self._way_out(self.grid.sequence))

    def _head(self) -> Seconds:
        """Logits of image codes at loss-carrying slots, and their cross-entropy in float32."""
        model, stage = self.config.model, self.config.recipe.stage
        slots = len(loss_frames(stage, self.grid.frames)) * self.grid.tokens_per_frame
        columns = -(-model.image_codes // self.parallel.tp)
        product = Product(self.samples * slots, columns, model.hidden, True, self.base_trains)
        logits = self.samples * slots * columns
        forward = self._product(product, "forward") + self._loss(logits, "forward")
        backward = self._product(product, "backward") + self._loss(logits, "backward")
        tp = self.machine.all_reduce(self.parallel.tp, 1, 12 * self.samples * slots)
        return Seconds(forward, backward, 0.0, tp, self._region(self.grid.image_tokens))

    def _product(self, product: Product, direction: Direction) -> float:
        m, n, k = product.rows, product.columns, product.depth
        if direction == "forward":
            return self._matrix(m, n, k)
        seconds = self._matrix(m, k, n) if product.input_gradient else 0.0
        return seconds + (self._matrix(n, k, m) if product.weight_gradient else 0.0)

    def _matrix(self, m: int, n: int, k: int) -> float:
        rate = self.hardware.gemm_flops_per_s(self.config.recipe.precision, m, n, k)
        return 2 * m * n * k / rate

    def _attention(self, layer: int, direction: Direction) -> float:
        execution = Execution(TILES[self.hardware.attention])
        parts = block_work(self.config.model, self.config.recipe, layer, execution)
        work = [part for part in parts if part.part.endswith("attention")]
        flops = sum(p.forward if direction == "forward" else p.input_gradient for p in work)
        rate = self.hardware.attention_tflops[direction] * 1e12
        return flops * self.samples / self.parallel.tp / rate

    def _pointwise(self, sublayer: Sublayer, direction: Direction) -> float:
        """Two LayerNorms and a residual sum outside regions; GELU or the mixture inside."""
        h, e, b = self.config.model.hidden, self.element, self.samples
        outside = self.parallel.tp if self.parallel.sequence_parallel else 1
        seconds = 0.0
        for slots, differentiated in (
            (self.grid.image_tokens, True),
            (self.grid.text, self.base_trains),
        ):
            if direction == "backward" and not differentiated:
                continue
            states = b * slots * h * e
            counts = FORWARD_STATES if direction == "forward" else BACKWARD_STATES
            for operation, part in POINTWISE[sublayer].items():
                if operation == "dropout" and not self.config.recipe.hidden_dropout:
                    continue
                if operation == "mix" and (self.base_trains or slots == self.grid.text):
                    continue
                parts = {"gelu": self.parallel.tp, "mix": 1}.get(operation, outside)
                name = operation if direction == "forward" else f"{operation}_backward"
                seconds += part * counts[operation] * states / parts / self._rate(name)
        return seconds

    def _loss(self, logits: int, direction: Direction) -> float:
        name = "softmax" if direction == "forward" else "softmax_backward"
        return LOGIT_BYTES[direction] * logits / self._rate(name)

    def _rate(self, operation: str) -> float:
        return self.hardware.bytes_per_s(operation)

    def _with_program(self, device: Mapping[Sublayer, float], block_ms: float) -> float:
        """Seconds of halves of a block: a GPU works while the program runs ahead, a CPU cannot."""
        seconds = sum(device.values())
        program = block_ms * 1e-3 * sum(PROGRAM_SHARE[sublayer] for sublayer in device)
        return max(seconds, program) if self.hardware.kind == "gpu" else seconds + program

    def _region(self, slots: int) -> float:
        """Into a region and out of it, in one direction: one collective, or two."""
        if not self.parallel.sequence_parallel:
            return self._way_out(slots)
        gathered = self.machine.all_gather(self.parallel.tp, 1, self._states(slots))
        return gathered + self._way_out(slots)

    def _way_out(self, slots: int) -> float:
        """Sums over ranks: whole on each, or each rank's slots of them."""
        if self.parallel.sequence_parallel:
            return self.machine.reduce_scatter(self.parallel.tp, 1, self._states(slots))
        return self.machine.all_reduce(self.parallel.tp, 1, self._states(slots))

    def _states(self, slots: int) -> int:
        return self.samples * slots * self.config.model.hidden * self.element


# What each half has of a block's program, as counted on a CPU at sizes that compute nothing.
PROGRAM_SHARE: dict[Sublayer, float] = {"attention": 0.8, "mlp": 0.2}

# States [slots, h] that pointwise operations read and write: e bytes each (GELU has four of them).
FORWARD_STATES = {"layer_norm": 8, "copy": 6, "gelu": 8, "mix": 3, "dropout": 2.5}
BACKWARD_STATES = {"layer_norm": 12, "copy": 9, "gelu": 12, "mix": 10, "dropout": 2.5}
# What each half has of them.
POINTWISE: dict[Sublayer, dict[str, float]] = {
    "attention": {"layer_norm": 0.5, "copy": 0.5, "mix": 1.0},
    "mlp": {"layer_norm": 0.5, "copy": 0.5, "gelu": 1.0, "dropout": 1.0},
}

# Bytes that cast, softmax and loss in float32 read and write for each logit.
LOGIT_BYTES: dict[Direction, int] = {"forward": 20, "backward": 12}


@dataclass(frozen=True)
class Reduction:
    """Communication between replicas, and the optimizer, of one step."""

    gradients: float
    weights: float
    optimizer: float


def reduction(config: Config, machine: Machine, trained: int, held: int, steps: int) -> Reduction:
    """What follows the backward passes on the rank that trains most.

    ZeRO 0 all-reduces gradients; 1 and 2 also gather weights, 2 reduces at each micro-batch; 3
    gathers all weights, frozen ones too, forward and backward of each micro-batch.

    Args:
        trained, held: elements on this rank.
        steps: micro-batches.
    """
    parallel, precision = config.parallel, config.recipe.precision
    element, dp, stride = ELEMENT_BYTES[precision], machine.dp, parallel.tp
    accumulated = 2 if precision == "fp16" else 4
    share = dp if parallel.zero else 1
    # Adam reads and writes master and moments, reads the gradient; norm and clipping pass it twice.
    memory = trained / share * (24 + 3 * accumulated) + trained * element
    optimizer = memory / machine.hardware.bytes_per_s("adam")
    if parallel.zero < 2:
        gradients = machine.all_reduce(dp, stride, trained * accumulated)
    else:
        gradients = steps * machine.reduce_scatter(dp, stride, trained * element)
    weights = machine.all_gather(dp, stride, trained * element) if parallel.zero else 0.0
    if parallel.zero == 3:
        weights = 2 * steps * machine.all_gather(dp, stride, held * element)
    return Reduction(gradients, weights, optimizer)


def checkpoint_bytes(config: Config) -> int:
    """Of a checkpoint: trained weights as they are, master weights, two moments."""
    trained = _trained(config.model, config.recipe.stage == "image")
    return trained * (ELEMENT_BYTES[config.recipe.precision] + 12)


@lru_cache(maxsize=16)
def _trained(model: ModelConfig, base: bool) -> int:
    rows = cached_table(model, base)
    return sum(prod(row.shape) for row in rows if base or row.trainable)


def trained_and_held(config: Config) -> list[tuple[int, int]]:
    """Elements that a rank of each pipeline stage trains, and all that it holds."""
    parameters = layer_parameters(config)
    stages = [[parameters[layer] for layer in layers] for layers in stages_of(config)]
    return [(sum(h.trained for h in s), sum(h.trained + h.frozen for h in s)) for s in stages]
