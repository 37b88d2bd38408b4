"""Which attention backend is preferred where: a table that was measured, or the expectation.

`megavideo benchmark attention` writes such a table for the machine it ran on, and the environment
variable MEGAVIDEO_ATTENTION_TABLE names one to go by. Where that has no row for a case, and without
it, attention_table.json beside this file decides. On GPUs that is what we expect: it has not been
measured; on a CPU, SDPA was measured to beat the reference.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megavideo.layout.rules import Family

VARIABLE = "MEGAVIDEO_ATTENTION_TABLE"
EXPECTATION = Path(__file__).with_suffix(".json")

Backend = Literal["library", "flex", "sdpa", "reference"]
DtypeName = Literal["bfloat16", "float16", "float32", "float64"]


@dataclass(frozen=True)
class Case:
    """What a choice of backend depends on.

    Attributes:
        device: type of the device, as `torch.device` has it.
        family: of the layout rule.
    """

    device: str
    dtype: torch.dtype
    head_size: int
    dropout: bool
    family: Family

    def __str__(self) -> str:
        noise = "with" if self.dropout else "without"
        sizes = f"{self.dtype}, head size {self.head_size}, {noise} dropout"
        return f"attention over {self.family} on {self.device}, {sizes}"


class Row(BaseModel):
    """Backends, best first, for the cases that fit; what is not named fits all."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    device: str = Field(min_length=1, description="name of a GPU; or cuda, or cpu, for any")
    dtype: DtypeName | None = None
    head_size: int | None = Field(default=None, ge=1)
    family: Family | None = None
    dropout: bool | None = None
    order: Annotated[list[Backend], Field(min_length=1)]

    @field_validator("order")
    @classmethod
    def _each_once(cls, order: list[Backend]) -> list[Backend]:
        if len(set(order)) < len(order):
            raise ValueError("names a backend twice")
        return order

    def fits(self, case: Case, device_name: str) -> bool:
        """Whether the row is for `case` on the device of this name."""
        wanted = (self.dtype, self.head_size, self.family, self.dropout)
        dtype = str(case.dtype).removeprefix("torch.")
        given = (dtype, case.head_size, case.family, case.dropout)
        pairs = zip(wanted, given, strict=True)
        is_device = self.device in (case.device, device_name)
        return is_device and all(want is None or want == is_ for want, is_ in pairs)


class Table(BaseModel):
    """The first row that fits a case decides."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    source: str = Field(min_length=1, description="where the rows are from")
    rows: list[Row]


@dataclass(frozen=True)
class Preference:
    """Backends, best first, and what says so."""

    order: tuple[Backend, ...]
    source: str


def preference(case: Case) -> Preference:
    """Who is preferred for `case`; ends with the reference, which can do everything.

    Raises:
        ValueError: if MEGAVIDEO_ATTENTION_TABLE names no table, or a wrong one.
    """
    named = os.environ.get(VARIABLE)
    for path in (*([Path(named)] if named else []), EXPECTATION):
        table = read(path)
        for row in table.rows:
            if row.fits(case, _device_name(case.device)):
                order = dict.fromkeys([*row.order, "reference"])
                where = "" if path == EXPECTATION else f" ({path})"
                return Preference(tuple(order), table.source + where)
    return Preference(("reference",), "no row of a table")


@lru_cache(maxsize=4)
def read(path: Path) -> Table:
    """The table in a file.

    Raises:
        ValueError: if it cannot be read, or is no such table.
    """
    try:
        return Table.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{VARIABLE}={path}: {error.strerror}; unset it, or name a file") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{path} is not a table of attention backends: {place}: {first['msg']}; "
            "`megavideo benchmark attention` writes one"
        ) from None


def _device_name(device: str) -> str:
    is_here = device == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_name() if is_here else device
