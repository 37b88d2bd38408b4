"""A machine in numbers: `configs/hardware/*.yaml`, or what `megavideo calibrate` measured.

Everything that a prediction needs to know about a device and its links, and nothing about models.
"""

from math import exp, log
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError
from ruamel.yaml import YAML

from megavideo.config.schema import Count, Positive, Precision, Section

PROFILES = Path(__file__).parents[2] / "configs" / "hardware"

NotNegative = Annotated[float, Field(ge=0)]
# rows m, columns n and depth k of C[m, n] = A[m, k] B[k, n], and the TFLOP/s that it reaches.
GemmPoint = tuple[Count, Count, Count, Positive]


class Rate(Section):
    """Of the messages between two devices that a ring is made of."""

    latency_us: NotNegative = Field(description="of one message between two devices")
    gb_per_s: Positive = Field(description="one direction of one device, as a large message gets")


class Link(Rate):
    """How devices reach each other: a message, also one of an all-reduce, and what differs."""

    all_gather: Rate | None = Field(
        None, description="a message of an all-gather; by default as one of an all-reduce"
    )
    reduce_scatter: Rate | None = Field(
        None, description="a message of a reduce-scatter; by default as one of an all-reduce"
    )


class Overhead(Section):
    """Time of programs around the arithmetic, as small as tensors may be."""

    layer_forward_ms: NotNegative = Field(description="of a block's forward pass")
    layer_backward_ms: NotNegative = Field(description="of a block's backward pass")
    micro_batch_ms: NotNegative = Field(description="of a micro-batch, beside its blocks")
    step_ms: NotNegative = Field(description="of an optimizer step")


class Hardware(Section):
    """One device, and how many of them are connected how."""

    name: str = Field(description="as --gpu takes it")
    device: str = Field(description="full name")
    source: str = Field(description="where the numbers are from")
    measured: bool = Field(description="whether `megavideo calibrate` measured them")
    kind: Literal["gpu", "cpu"] = Field(
        description="a gpu computes while programs run ahead; on a cpu both take turns"
    )
    attention: Literal["library", "flex", "sdpa", "reference"] = Field(
        description="attention backend that is assumed (megavideo/ops/backends.py)"
    )
    memory_gib: Positive = Field(description="of a device")
    reserve_gib: NotNegative = Field(
        description="context, communication buffers and fragmentation: never the model's"
    )
    devices_per_node: Count = Field(description="devices that the fast link connects")
    peak_tflops: dict[Precision, Positive] = Field(
        description="dense matrix products, by precision"
    )
    gemm: dict[Precision, list[GemmPoint]] = Field(
        description="TFLOP/s of matrix products [rows, columns, depth, TFLOP/s], by precision"
    )
    attention_tflops: dict[Literal["forward", "backward"], Positive] = Field(
        description="executed products of attention"
    )
    pointwise_gb_per_s: dict[str, Positive] = Field(
        description="bytes read and written by copy, layer_norm, gelu, mix, dropout, softmax, adam "
        "(and _backward); what is not named goes at copy's rate"
    )
    overhead: Overhead
    node_link: Link = Field(description="between devices of a node")
    network: Link = Field(description="between devices of different nodes")
    disk_gb_per_s: Positive = Field(description="writing a checkpoint, all ranks together")

    def gemm_flops_per_s(self, precision: Precision, m: int, n: int, k: int) -> float:
        """Rate of a product of this shape, between those of the shapes in the profile.

        The logarithm of the rate is averaged over the profile's points, weighted by the inverse
        square of their distance in log2 of rows, columns and depth.

        Raises:
            ValueError: if the profile has no rates of this precision.
        """
        if precision not in self.gemm:
            raise ValueError(
                f"hardware profile {self.name} has no matrix products in {precision}, only "
                f"{', '.join(self.gemm)}; set recipe.precision, or measure with megavideo calibrate"
            )
        weights = total = 0.0
        for rows, columns, depth, rate in self.gemm[precision]:
            distance = log(m / rows) ** 2 + log(n / columns) ** 2 + log(k / depth) ** 2
            if distance < 1e-6:
                return rate * 1e12
            weights += 1 / distance
            total += log(rate) / distance
        return exp(total / weights) * 1e12

    def bytes_per_s(self, operation: str) -> float:
        """Rate of a pointwise operation."""
        rates = self.pointwise_gb_per_s
        return rates.get(operation, rates["copy"]) * 1e9


def load_hardware(name: str) -> Hardware:
    """The profile of this name in configs/hardware/, or in the YAML file of this path.

    Raises:
        ValueError: if there is none, or a value is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in PROFILES.glob("*.yaml")))
        raise ValueError(
            f"no hardware profile {name}; use {known}, or the path of a file that megavideo "
            "calibrate wrote"
        )
    try:
        return Hardware.model_validate(YAML(typ="safe", pure=True).load(path), strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}") from None
