"""Finds the objects in pictures of the embedded `shapes` world, without a neural network.

Lengths are those of `jflow.data.scenes`, of which a picture has 32 a side.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from jflow.data.scenes import COLORS, RADIUS, SHAPES, SIDE, Object, coverage

MAX_SIZE = 64  # of a picture in pixels; larger ones are averaged down to it
SMOOTHING = 0.5  # sigma, in pixels, of what decides which pixels belong together
MIN_COVERAGE = 0.5
DEBRIS = 0.5 * math.pi * RADIUS[0] ** 2  # half the area of the smallest object
REACH = 2.0  # how far a blurred object spreads over the pixels that are half covered
# An upside-down triangle reaches 0.91 and an ellipse of 1.6 to 1 0.92; what is right stays above
# 0.93 under noise of sigma 0.1 (pixels in [0, 1]).
MIN_SCORE = 0.92

# Windows in which shapes are compared are cut out around the centroid and scaled to one radius.
WINDOW_RADIUS = 4.0
WINDOW_AXIS = np.linspace(-1.9 * WINDOW_RADIUS, 1.9 * WINDOW_RADIUS, 20)
TEMPLATE_RADII = (0.92, 1.0, 1.08)
TEMPLATE_SHIFTS = (-0.3, 0.0, 0.3)
TEMPLATE_BLURS = (0.0, 0.6, 1.0, 1.4)

_NAMES = tuple(COLORS)
_COLORS = np.array(list(COLORS.values()))


@dataclass(frozen=True)
class Detection:
    """`shape` is None where none fits; `box` is (x0, y0, x1, y1); `score`, at most 1, says how well
    the shape fits."""

    shape: str | None
    color: str
    box: tuple[float, float, float, float]
    score: float


def detect(image: np.ndarray) -> list[Detection]:
    """The objects of a picture, best score first.  [S, S, 3] float in [-1, 1]; what lies outside is
    clipped and NaN is mid-grey, so that the pictures of a diverged model can be scored.

    The background is the median color.  Pieces of one color with less than half the area of the
    smallest object are debris and left out.  Shapes are known in upright orientation only.  Meant
    for S from 24 on.  Raises ValueError for an array of another shape or of integers.
    """
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3:
        raise ValueError(f"detect needs one square picture [S, S, 3], not {image.shape}.")
    if not np.issubdtype(image.dtype, np.floating):
        raise ValueError(f"detect needs floats in [-1, 1], not {image.dtype}.")
    image = np.clip(np.nan_to_num(image.astype(np.float64)), -1, 1)
    image = _reduced((image + 1) / 2)
    scale = len(image) / SIDE
    background = np.median(image, axis=(0, 1))
    pieces, colors = _pieces(image, background, scale)
    if not colors:
        return []
    # Each pixel near a piece belongs to the nearest one.
    distance, (rows, columns) = ndimage.distance_transform_edt(pieces == 0, return_indices=True)
    owner = np.where(distance <= REACH * scale, pieces[rows, columns], 0)
    found = []
    for number, color in enumerate(colors, 1):
        ray = color - background
        alpha = np.where(owner == number, (image - background) @ ray / (ray @ ray), 0)
        name = _NAMES[((_COLORS - color) ** 2).sum(-1).argmin()]
        found.append(_classified(alpha, pieces == number, name, scale))
    return sorted(found, key=lambda d: -d.score)


def _reduced(image: np.ndarray) -> np.ndarray:
    """At most MAX_SIZE pixels a side, each the mean over its square.  [S, S, 3] -> [s, s, 3]."""
    size = len(image)
    if size <= MAX_SIZE:
        return image
    edges = np.arange(MAX_SIZE + 1) * size / MAX_SIZE
    shared = np.minimum(edges[1:, None], np.arange(1, size + 1))
    shared = np.clip(shared - np.maximum(edges[:-1, None], np.arange(size)), 0, None)
    shared *= MAX_SIZE / size
    return np.einsum("ai,ijc,bj->abc", shared, image, shared, optimize=True)


def _pieces(
    image: np.ndarray, background: np.ndarray, scale: float
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Connected regions of one color that are more than debris: a map [s, s] of their numbers (from
    1; 0 elsewhere) and the mean color of the core of each, [3]."""
    rays = _COLORS - background
    rays = rays[np.linalg.norm(rays, axis=-1) > 0.2]  # The background's own color cannot be seen.
    offset = (image - background)[..., None, :]
    alpha = (offset * rays).sum(-1) / (rays * rays).sum(-1)
    misfit = ((offset - np.clip(alpha, 0, 1)[..., None] * rays) ** 2).sum(-1)
    sigma = (SMOOTHING * scale, SMOOTHING * scale, 0)
    best = ndimage.gaussian_filter(misfit, sigma).argmin(-1)
    alpha = ndimage.gaussian_filter(alpha, sigma)
    covered = np.take_along_axis(alpha, best[..., None], -1)[..., 0] > MIN_COVERAGE
    pieces, colors = np.zeros(best.shape, int), []
    for hypothesis in np.unique(best[covered]):
        regions, count = ndimage.label(covered & (best == hypothesis))
        for number in range(1, count + 1):
            region = regions == number
            if region.sum() < DEBRIS * scale**2:
                continue
            core = ndimage.binary_erosion(region, iterations=max(round(scale), 1))
            colors.append(image[core if core.any() else region].mean(0))
            pieces[region] = len(colors)
    return pieces, colors


def _classified(alpha: np.ndarray, region: np.ndarray, color: str, scale: float) -> Detection:
    """The shape whose template correlates best.  alpha: an object's soft coverage [s, s], 0 where
    others are; region: its pixels, for the box of an object of unknown shape."""
    area = alpha.sum()
    centres = np.arange(len(alpha)) + 0.5
    x, y = alpha.sum(0) @ centres / area, alpha.sum(1) @ centres / area
    radius = math.sqrt(max(area, 1.0) / math.pi)
    axis = WINDOW_AXIS * radius / WINDOW_RADIUS - 0.5
    window = ndimage.map_coordinates(alpha, np.meshgrid(y + axis, x + axis, indexing="ij"), order=1)
    shapes, templates = _templates()
    window = (window - window.mean()).ravel()
    scores = templates @ window / np.linalg.norm(window)
    best = int(scores.argmax())
    shape, score = shapes[best], float(scores[best])
    if score >= MIN_SCORE:
        box = Object(shape, color, x / scale, y / scale, radius / scale).box
        return Detection(shape, color, box, score)
    (rows, columns) = ndimage.find_objects(region.astype(int))[0]
    box = tuple(v / scale for v in (columns.start, rows.start, columns.stop, rows.stop))
    return Detection(None, color, box, score)


@cache
def _templates() -> tuple[list[str], np.ndarray]:
    """The shape of each template and the templates, of mean 0 and norm 1.  [T], [T, W * W]."""
    step = WINDOW_AXIS[1] - WINDOW_AXIS[0]
    grid = np.stack(np.meshgrid(WINDOW_AXIS, WINDOW_AXIS), axis=-1)
    shapes, templates = [], []
    for shape in SHAPES:
        for size in TEMPLATE_RADII:
            for x in TEMPLATE_SHIFTS:
                for y in TEMPLATE_SHIFTS:
                    sharp = coverage(shape, x, y, size * WINDOW_RADIUS, grid)
                    for blur in TEMPLATE_BLURS:
                        templates.append(ndimage.gaussian_filter(sharp, blur / step).ravel())
                        shapes.append(shape)
    templates = np.stack(templates)
    templates -= templates.mean(-1, keepdims=True)
    return shapes, templates / np.linalg.norm(templates, axis=-1, keepdims=True)
