"""Which keys of a grid a query of a (finer) grid sees: a window around its own cell.

Super-resolution attends so: to its own grid, and to the low-resolution grid that is refined.
"""

from dataclasses import asdict, dataclass

from megavideo.layout.rules import Slots


@dataclass(frozen=True)
class NeighbourhoodRule:
    """`rule(q, k)`: may query `q` see key `k`? Both are raster indices, each in its own grid.

    A query sees the keys around the cell that it lies in, as far as they exist: windows are clipped
    at the border, not moved. (CogView2's Image-Local-Attention; its 9x5 window has 9 rows.)

    Attributes:
        rows, columns: of queries; multiples of `key_rows`, `key_columns`.
        key_rows, key_columns: of keys.
        window_rows, window_columns: odd; the window reaches half of it in each direction.
        causal: only keys before the cell in raster order, and the cell itself.

    Raises ValueError for sizes that do not fit.
    """

    rows: int
    columns: int
    key_rows: int
    key_columns: int
    window_rows: int
    window_columns: int
    causal: bool = False

    def __post_init__(self) -> None:
        if self.rows % self.key_rows or self.columns % self.key_columns:
            raise ValueError(
                f"{self.rows}x{self.columns} queries over {self.key_rows}x{self.key_columns} keys: "
                "each key must be the cell of as many queries as any other"
            )
        if not (self.window_rows % 2 and self.window_columns % 2):
            raise ValueError(
                f"window {self.window_rows}x{self.window_columns}: both sides must be odd"
            )

    @property
    def queries(self) -> int:
        """Number of queries."""
        return self.rows * self.columns

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.key_rows * self.key_columns

    def __call__(self, q: Slots, k: Slots) -> Slots:
        """Whether `q` sees `k`; broadcasts."""
        below = k // self.key_columns - q // self.columns // (self.rows // self.key_rows)
        right = k % self.key_columns - q % self.columns // (self.columns // self.key_columns)
        near = (abs(below) <= self.window_rows // 2) & (abs(right) <= self.window_columns // 2)
        if not self.causal:
            return near
        return near & ((below < 0) | ((below == 0) & (right <= 0)))


def encode_rules(rules: tuple[NeighbourhoodRule, ...]) -> str:
    """`rules` as a string, because a torch operator takes no Python objects."""
    return ";".join(",".join(str(int(x)) for x in asdict(rule).values()) for rule in rules)


def decode_rules(text: str) -> tuple[NeighbourhoodRule, ...]:
    """Inverse of `encode_rules`."""
    values = [[int(x) for x in part.split(",")] for part in text.split(";")]
    return tuple(NeighbourhoodRule(*sizes[:6], bool(sizes[6])) for sizes in values)  # type: ignore[call-arg, arg-type]
