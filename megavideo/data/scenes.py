"""Procedural scenes: one coloured shape that does one thing, with the sentence that says it.

Every motion starts at the same place and size (or with an empty picture), so that the first frame
does not give away what comes: a model has to read the text. Colour, shape and motion are spread
evenly over the clips, so a caption taken from another clip is usually wrong about all three.
Lengths are shares of the picture's side, x to the right and y down, the origin in the middle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np

Array = np.ndarray

COLORS = {
    "red": (225, 25, 30),
    "green": (20, 160, 50),
    "blue": (35, 70, 225),
    "yellow": (250, 215, 20),
    "purple": (150, 40, 190),
    "orange": (250, 130, 10),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "pink": (255, 180, 200),
}
TEMPLATES = (
    "{a} {color} {shape} {motion} on a {background} background",
    "on a {background} background, {a} {color} {shape} {motion}",
    "{a} {color} {shape} {motion}, the background is {background}",
)

RADIUS = 0.22  # of the shape
TRAVEL = 0.4  # of a move, which ends with the shape half out of sight
SWING = 0.25  # of a bounce, to either side: there the shape touches the border
JITTER = 0.03  # of the starting place, per axis
OUTSIDE = 0.5 + RADIUS + JITTER  # centre of a shape that is just out of sight


# Shapes: signed distance from the outline in units of the radius, negative inside.


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 1


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.75) - 0.25


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _triangle(x: Array, y: Array) -> Array:
    slope = np.abs(x) * np.sin(np.pi / 3)
    return np.maximum(slope - y / 2 - 0.55, y - 0.55)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.34)


def _star(x: Array, y: Array) -> Array:
    """Five points: fold the plane onto half a point, then one straight edge from tip to notch."""
    tenth = np.pi / 5
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)  # from the upper tip
    angle = np.abs((angle + tenth) % (2 * tenth) - tenth)
    notch = 0.5
    edge_x, edge_y = notch * np.cos(tenth) - 1, notch * np.sin(tenth)
    length = np.hypot(edge_x, edge_y)
    from_tip_x, from_tip_y = radius * np.cos(angle) - 1, radius * np.sin(angle)
    return (from_tip_y * -edge_x + from_tip_x * edge_y) / length


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
ROUND = ("circle", "ring")  # turning them cannot be seen


@dataclass(frozen=True)
class Pose:
    """Where a shape is and how it looks, at each time: arrays, or numbers that do not change."""

    x: Array | float = 0.0
    y: Array | float = 0.0
    scale: Array | float = 1.0
    angle: Array | float = 0.0  # clockwise, radians
    opacity: Array | float = 1.0


# Motions: pose at the share u of the clip's length, 0 <= u < 1.


def _moves(x: int, y: int) -> Callable[[Array], Pose]:
    return lambda u: Pose(x=x * TRAVEL * u, y=y * TRAVEL * u)


def _enters(x: int, y: int) -> Callable[[Array], Pose]:
    """From outside the border on side (x, y) to the middle, there at 0.6."""
    return lambda u: Pose(x=x * OUTSIDE * _ramp(u, 0.6, 0), y=y * OUTSIDE * _ramp(u, 0.6, 0))


def _bounces(x: int, y: int) -> Callable[[Array], Pose]:
    """To one side, back through the middle to the other, at constant speed; one round takes 0.8."""

    def pose(u: Array) -> Pose:
        wave = 1 - np.abs((u / 0.8 + 0.75) % 1 * 4 - 2)  # triangle wave that starts at 0, falling
        return Pose(x=x * SWING * wave, y=y * SWING * wave)

    return pose


def _ramp(u: Array, start: float, end: float) -> Array:
    """0 before `start`, 1 after `end`; falling if `end` is the earlier one."""
    return np.clip((u - start) / (end - start), 0, 1)


MOTIONS: dict[str, Callable[[Array], Pose]] = {
    "moves to the left": _moves(-1, 0),
    "moves to the right": _moves(1, 0),
    "moves up": _moves(0, -1),
    "moves down": _moves(0, 1),
    "moves to the top left corner": _moves(-1, -1),
    "moves to the top right corner": _moves(1, -1),
    "moves to the bottom left corner": _moves(-1, 1),
    "moves to the bottom right corner": _moves(1, 1),
    "enters from the left": _enters(-1, 0),
    "enters from the right": _enters(1, 0),
    "enters from the top": _enters(0, -1),
    "enters from the bottom": _enters(0, 1),
    "bounces left and right": _bounces(1, 0),
    "bounces up and down": _bounces(0, 1),
    "grows": lambda u: Pose(scale=1 + 0.9 * u),
    "shrinks": lambda u: Pose(scale=1 - 0.7 * u),
    "appears": lambda u: Pose(opacity=_ramp(u, 0.1, 0.5)),
    "disappears": lambda u: Pose(opacity=_ramp(u, 0.5, 0.1)),
    "blinks": lambda u: Pose(opacity=np.floor(5 * u) % 2 == 0),
    "rotates": lambda u: Pose(angle=np.pi * u),
    "does not move": lambda u: Pose(),
}


@dataclass(frozen=True)
class Scene:
    """What one clip shows. `x`, `y`: shift of the whole path from the middle."""

    shape: str
    motion: str
    color: str
    background: str
    template: str
    x: float
    y: float

    @property
    def caption(self) -> str:
        article = "an" if self.color[0] in "aeiou" else "a"
        return self.template.format(
            a=article,
            color=self.color,
            shape=self.shape,
            motion=self.motion,
            background=self.background,
        )


ACTIONS = [
    (shape, motion)
    for shape, motion in product(SHAPES, MOTIONS)
    if not (motion == "rotates" and shape in ROUND)
]


def make_scene(seed: int, number: int) -> Scene:
    """Scene `number` of the endless list that belongs to `seed`."""
    shape, motion = ACTIONS[_dealt(seed, 0, number, len(ACTIONS))]
    shift_x, shift_y = np.random.default_rng([seed, 4, number]).uniform(-JITTER, JITTER, 2)
    return Scene(
        shape,
        motion,
        color=list(COLORS)[_dealt(seed, 1, number, len(COLORS))],
        background=list(BACKGROUNDS)[_dealt(seed, 2, number, len(BACKGROUNDS))],
        template=TEMPLATES[_dealt(seed, 3, number, len(TEMPLATES))],
        x=float(shift_x),
        y=float(shift_y),
    )


def _dealt(seed: int, deck: int, number: int, size: int) -> int:
    """Card `number` of shuffled decks of `size` cards: every card comes equally often."""
    shuffle, place = divmod(number, size)
    return int(np.random.default_rng([seed, deck, shuffle]).permutation(size)[place])


def draw_scene(scene: Scene, size: int, num_frames: int) -> Array:
    """The scene at even times, uint8 [num_frames, size, size, 3], anti-aliased."""
    shares = np.arange(num_frames, dtype=np.float32)[:, None, None] / num_frames
    pose = MOTIONS[scene.motion](shares)
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x = centres[None, None, :] - np.float32(scene.x) - pose.x
    y = centres[None, :, None] - np.float32(scene.y) - pose.y
    cosine, sine = np.cos(pose.angle), np.sin(pose.angle)
    radius = RADIUS * pose.scale
    distance = SHAPES[scene.shape](
        (x * cosine + y * sine) / radius, (y * cosine - x * sine) / radius
    )
    inside = np.clip(0.5 - distance * radius * size, 0, 1) * pose.opacity  # share of each pixel
    color = np.array(COLORS[scene.color], np.float32)
    background = np.array(BACKGROUNDS[scene.background], np.float32)
    frames = background + inside[..., None].astype(np.float32) * (color - background)
    return np.broadcast_to(np.rint(frames), (num_frames, size, size, 3)).astype(np.uint8)
