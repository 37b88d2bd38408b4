"""Who sees whom: every attention mask of the model is one integer rule, written here and only here.

A rule speaks of image slots i in [0, V): frame i // N, raster index i % N (see grid.py). Text is
the same for every rule: an image query sees all real text slots, a text query sees real text and
no image (`text_visible`).
"""

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megavideo.layout.grid import Grid

# An integer, a NumPy array or a torch tensor: rules use only //, %, comparisons and & | on them.
Slots = Any
# Rules that programs find alike: a block is a frame, everything, or a window through all frames.
Family = Literal["frames", "everything", "windows"]


@dataclass(frozen=True)
class Rule:
    """`rule(q, k)`: may image slot `q` see image slot `k`? (CogVideo, section 3; docs/model.md 4.)

    Slots see each other only inside one block: the same frame (spatial channel), or the same window
    through all frames (temporal channel), or anything. Inside a block, order decides.

    Attributes:
        frames, side: the grid.
        own_frame: a block is one frame.
        window: side of the windows that tile a frame; 0 has none.
        shift: windows are cut `shift` rows and columns later, and do not wrap around the border:
            20 rows with window 10 and shift 5 become 0-4 | 5-14 | 15-19.
        two_way: even frames are given (interpolation), so all see all of them, and they see no odd
            frame; odd frames are causal. Otherwise everything is causal in raster order.
    """

    frames: int
    side: int
    own_frame: bool = False
    window: int = 0
    shift: int = 0
    two_way: bool = False

    def __call__(self, q: Slots, k: Slots) -> Slots:
        """Whether `q` sees `k`; broadcasts."""
        return self._in_order(q, k) & (self.block(q) == self.block(k))

    def block(self, slot: Slots) -> Slots:
        """Number of the block that `slot` is in; slots of different blocks never see each other."""
        if self.own_frame:
            return slot // self._per_frame
        if self.window:
            row = slot % self._per_frame // self.side
            column = slot % self.side
            return self._band(row) * (self.side + 1) + self._band(column)
        return slot * 0

    def _in_order(self, q: Slots, k: Slots) -> Slots:
        if not self.two_way:
            return k <= q
        k_given = k // self._per_frame % 2 == 0
        q_given = q // self._per_frame % 2 == 0
        return k_given | ((q_given == k_given) & (k <= q))

    def _band(self, coordinate: Slots) -> Slots:
        return (coordinate + self.window - self.shift) // self.window

    @property
    def family(self) -> Family:
        """What its blocks are."""
        return "frames" if self.own_frame else "windows" if self.window else "everything"

    @property
    def _per_frame(self) -> int:
        return self.side * self.side


def spatial_rule(grid: Grid, stage: str) -> Rule:
    """The frozen channel: a frame sees itself, causally or (given frames, stage 2) whole."""
    return Rule(grid.frames, grid.side, own_frame=True, two_way=stage == "interpolation")


def temporal_rule(grid: Grid, stage: str, window: int, layer: int) -> Rule:
    """The trainable channel of `layer`: odd layers shift their windows by half a window."""
    return Rule(
        grid.frames,
        grid.side,
        window=window,
        shift=window // 2 if layer % 2 else 0,
        two_way=stage == "interpolation",
    )


def text_visible(slot: Slots, text_length: Slots, text_slots: int) -> Slots:
    """Whether text slot `slot` holds a real token: text is left-padded."""
    return slot >= text_slots - text_length


def loss_frames(stage: str, frames: int) -> tuple[int, ...]:
    """Frames whose tokens carry loss (docs/model.md 2): the rest of a sample is given."""
    if stage == "image":
        return (0,)
    return tuple(range(1, frames)) if stage == "keyframes" else tuple(range(1, frames, 2))


def encode_rule(rule: Rule) -> str:
    """`rule` as a string, because a torch operator takes no Python objects."""
    return ",".join(f"{name}={int(value)}" for name, value in asdict(rule).items())


def decode_rule(text: str) -> Rule:
    """Inverse of `encode_rule`."""
    values = {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
    return Rule(**{field.name: field.type(values[field.name]) for field in fields(Rule)})  # type: ignore[operator]
