"""The pictures of the embedded `shapes` world: coloured shapes of equal area on grey.

Lengths are in units of which a picture has 32 a side, x to the right and y down, so a scene can be
drawn at any size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SIDE = 32
BACKGROUND = 0.55
COLORS = {
    "red": (0.86, 0.12, 0.12),
    "green": (0.12, 0.66, 0.20),
    "blue": (0.14, 0.28, 0.92),
    "yellow": (0.96, 0.88, 0.14),
    "purple": (0.62, 0.12, 0.78),
    "orange": (1.0, 0.52, 0.05),
    "white": (1.0, 1.0, 1.0),
    "black": (0.0, 0.0, 0.0),
}
# Colors that are never asked for, to learn more pairs from: see `pairs`.
MORE_COLORS = {
    "pink": (1.0, 0.6, 0.75),
    "brown": (0.45, 0.27, 0.1),
    "cyan": (0.1, 0.85, 0.9),
    "lime": (0.65, 0.95, 0.2),
    "navy": (0.05, 0.08, 0.4),
    "teal": (0.0, 0.45, 0.45),
    "maroon": (0.45, 0.03, 0.1),
    "violet": (0.75, 0.55, 1.0),
}
_RGB = COLORS | MORE_COLORS
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")

# No picture, caption or question of the training split has these; every color is missing once.
HELD_OUT = {
    "circle": ("blue", "yellow"),
    "square": ("red", "white"),
    "triangle": ("green", "black"),
    "cross": ("purple", "orange"),
}
SPLITS = ("train", "seen", "unseen")
WIDE = "wide"  # of `pairs` alone: no split

RADIUS = (3.4, 4.6)  # of the circle of the same area
GAP = 1.5  # between two objects
MARGIN = 1.0  # between an object and the picture's edge
POSITION_THRESHOLD = 0.1  # GenEval's

_square, _cross, _triangle = (
    math.sqrt(math.pi) / 2,
    math.sqrt(math.pi / 5) / 2,
    math.pi**0.5 / 27**0.25,
)
# Outlines of area pi around their centroid.
POLYGONS = {
    "square": _square * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": _triangle * np.array([(0, -2), (math.sqrt(3), 1), (-math.sqrt(3), 1)]),
    "cross": _cross
    * np.array(
        [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]
        + [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
    ),
}

_EDGES = {shape: np.roll(corners, -1, axis=0) - corners for shape, corners in POLYGONS.items()}
# Four points of every edge, from its corner on.
_OUTLINES = {
    shape: (corners + np.arange(4)[:, None, None] / 4 * _EDGES[shape]).reshape(-1, 2)
    for shape, corners in POLYGONS.items()
}
_BOXES = {"circle": (-1.0, -1.0, 1.0, 1.0)} | {
    s: (*c.min(0).tolist(), *c.max(0).tolist()) for s, c in POLYGONS.items()
}
_REACH = {"circle": 1.0} | {s: float(np.hypot(*c.T).max()) for s, c in POLYGONS.items()}

Pair = tuple[str, str]  # (shape, color)


@dataclass(frozen=True)
class Object:
    """A shape with its centroid (x, y); `radius` is that of the circle of the same area."""

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1)."""
        x0, y0, x1, y1 = (side * self.radius for side in _BOXES[self.shape])
        return self.x + x0, self.y + y0, self.x + x1, self.y + y1


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]


def pairs(split: str) -> tuple[Pair, ...]:
    """The (shape, color) pairs of a split: "train" and "seen" (other draws of the same pairs), or
    "unseen" (the held-out pairs alone); of WIDE those of "train", and each of MORE_COLORS in all
    shapes.  Raises ValueError for another name."""
    if split not in (*SPLITS, WIDE):
        raise ValueError(f"The splits of shapes are {', '.join(SPLITS)}, not {split!r}.")
    if split == WIDE:
        return pairs("train") + tuple((s, c) for s in SHAPES for c in MORE_COLORS)
    held = split == "unseen"
    return tuple((s, c) for s in SHAPES for c in COLORS if (c in HELD_OUT[s]) == held)


def signed_distance(shape: str, radius: float, points: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape centred at 0, negative inside.  [..., 2] -> [...]."""
    if shape == "circle":
        return np.hypot(points[..., 0], points[..., 1]) - radius
    a, edge = POLYGONS[shape] * radius, _EDGES[shape] * radius
    d = points[..., None, :] - a
    along = np.clip((d * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
    distance = np.sqrt(((d - along[..., None] * edge) ** 2).sum(-1).min(-1))
    # A point is inside when a ray from it to the right crosses an odd number of edges.
    down = d[..., 1] >= 0
    following = np.concatenate([down[..., 1:], down[..., :1]], axis=-1)
    crosses = (down != following) & (
        (d[..., 0] * edge[:, 1] < d[..., 1] * edge[:, 0]) == (edge[:, 1] > 0)
    )
    return np.where(crosses.sum(-1) % 2 == 1, -distance, distance)


def coverage(shape: str, x: float, y: float, radius: float, grid: np.ndarray) -> np.ndarray:
    """How much of each pixel (0 to 1) a shape covers; all in pixels, grid [..., 2] the pixels'
    centres (x, y)."""
    return np.clip(0.5 - signed_distance(shape, radius, grid - (x, y)), 0, 1)


def pixel_grid(size: int) -> np.ndarray:
    """The (x, y) of the pixels' centres.  [size, size, 2]."""
    return np.stack(np.meshgrid(np.arange(size), np.arange(size)), axis=-1) + 0.5


def render(scene: Scene, size: int = SIDE) -> np.ndarray:
    """The anti-aliased picture.  [size, size, 3] float32 in [-1, 1]."""
    image, grid, scale = np.full((size, size, 3), BACKGROUND), pixel_grid(size), size / SIDE
    for o in scene.objects:
        # A pixel whose centre is further than half a pixel from the object stays as it is.
        left, top, right, bottom = (int(v * scale) for v in o.box)
        part = np.s_[max(top - 1, 0) : bottom + 2, max(left - 1, 0) : right + 2]
        alpha = coverage(o.shape, o.x * scale, o.y * scale, o.radius * scale, grid[part])
        image[part] += alpha[..., None] * (np.array(_RGB[o.color]) - image[part])
    return (2 * image - 1).astype(np.float32)


def gap(a: Object, b: Object) -> float:
    """The distance between two objects, not positive where they overlap."""
    if a.shape == "circle":
        return float(
            signed_distance(b.shape, b.radius, np.array([a.x - b.x, a.y - b.y])) - a.radius
        )
    if b.shape == "circle":
        return gap(b, a)

    # Disjoint polygons are nearest at a corner of one; points between corners betray an overlap.
    def from_outline(a: Object, b: Object) -> float:
        outline = _OUTLINES[a.shape] * a.radius + (a.x - b.x, a.y - b.y)
        return float(signed_distance(b.shape, b.radius, outline).min())

    return min(from_outline(a, b), from_outline(b, a))


def _apart(a: Object, b: Object) -> bool:
    """Whether two objects keep GAP; far ones are told by the circles around them, in no time."""
    reach = _REACH[a.shape] * a.radius + _REACH[b.shape] * b.radius
    return math.hypot(a.x - b.x, a.y - b.y) >= reach + GAP or gap(a, b) >= GAP


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies from box b, both (x0, y0, x1, y1): none, one or two of RELATIONS.

    The rule of GenEval's evaluate_images.py: the offset of the centres, shortened by a tenth of the
    sizes, has to be more than half of its former length along the axis.
    """

    def reduced(low_a: float, high_a: float, low_b: float, high_b: float) -> tuple[float, float]:
        offset = (low_a + high_a) / 2 - (low_b + high_b) / 2
        size = abs(high_a - low_a) + abs(high_b - low_b)
        return offset, math.copysign(max(abs(offset) - POSITION_THRESHOLD * size, 0), offset)

    offset_x, dx = reduced(a[0], a[2], b[0], b[2])
    offset_y, dy = reduced(a[1], a[3], b[1], b[3])
    if max(abs(dx), abs(dy)) < 1e-3:
        return set()
    distance = math.hypot(offset_x, offset_y)
    dx, dy = dx / distance, dy / distance
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return {r for r, is_so in zip(RELATIONS, holds, strict=True) if is_so}


def place(
    wanted: Sequence[Pair], rng: np.random.Generator, accept: Callable[[list[Object]], bool]
) -> Scene:
    """Objects of the wanted pairs, in this order, at random sizes and places that `accept` likes,
    apart from each other and from the edge."""
    while True:
        objects: list[Object] = []
        for shape, color in wanted:
            for _ in range(20):
                o = Object(shape, color, 0.0, 0.0, float(rng.uniform(*RADIUS)))
                x0, y0, x1, y1 = o.box
                x = float(rng.uniform(MARGIN - x0, SIDE - MARGIN - x1))
                y = float(rng.uniform(MARGIN - y0, SIDE - MARGIN - y1))
                o = Object(shape, color, x, y, o.radius)
                if all(_apart(o, other) for other in objects):
                    objects.append(o)
                    break
        if len(objects) == len(wanted) and accept(objects):
            return Scene(tuple(objects))
