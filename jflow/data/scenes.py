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
        corners = POLYGONS.get(self.shape, np.array([(-1, -1), (1, 1)])) * self.radius
        (x0, y0), (x1, y1) = corners.min(0), corners.max(0)
        return self.x + x0, self.y + y0, self.x + x1, self.y + y1


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]


def pairs(split: str) -> tuple[Pair, ...]:
    """The (shape, color) pairs of a split: "train" and "seen" (other draws of the same pairs), or
    "unseen" (the held-out pairs alone).  Raises ValueError for another name."""
    if split not in SPLITS:
        raise ValueError(f"The splits of shapes are {', '.join(SPLITS)}, not {split!r}.")
    held = split == "unseen"
    return tuple((s, c) for s in SHAPES for c in COLORS if (c in HELD_OUT[s]) == held)


def signed_distance(shape: str, radius: float, points: np.ndarray) -> np.ndarray:
    """Distance to the outline of a shape centred at 0, negative inside.  [..., 2] -> [...]."""
    if shape == "circle":
        return np.hypot(points[..., 0], points[..., 1]) - radius
    a = POLYGONS[shape] * radius
    edge = np.roll(a, -1, axis=0) - a
    d = points[..., None, :] - a
    along = np.clip((d * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
    distance = np.sqrt(((d - along[..., None] * edge) ** 2).sum(-1).min(-1))
    # A point is inside when a ray from it to the right crosses an odd number of edges.
    down = d[..., 1] >= 0
    crosses = (down != np.roll(down, -1, axis=-1)) & (
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
        alpha = coverage(o.shape, o.x * scale, o.y * scale, o.radius * scale, grid)[..., None]
        image += alpha * (np.array(COLORS[o.color]) - image)
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
    steps = np.linspace(0, 1, 4, endpoint=False)[:, None, None]

    def from_outline(a: Object, b: Object) -> float:
        corners = POLYGONS[a.shape] * a.radius + (a.x - b.x, a.y - b.y)
        outline = corners + steps * (np.roll(corners, -1, axis=0) - corners)
        return float(signed_distance(b.shape, b.radius, outline).min())

    return min(from_outline(a, b), from_outline(b, a))


def relative_position(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies from box b, both (x0, y0, x1, y1): none, one or two of RELATIONS.

    The rule of GenEval's evaluate_images.py: the offset of the centres, shortened by a tenth of the
    sizes, has to be more than half of its former length along the axis.
    """
    boxes = np.array([a, b], dtype=float).reshape(2, 2, 2)
    (center_a, center_b), size = boxes.mean(1), np.abs(np.diff(boxes, axis=1)).sum((0, 1))
    offset = center_a - center_b
    reduced = np.maximum(np.abs(offset) - POSITION_THRESHOLD * size, 0) * np.sign(offset)
    if np.all(np.abs(reduced) < 1e-3):
        return set()
    dx, dy = reduced / np.linalg.norm(offset)
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
                if all(gap(o, other) >= GAP for other in objects):
                    objects.append(o)
                    break
        if len(objects) == len(wanted) and accept(objects):
            return Scene(tuple(objects))
