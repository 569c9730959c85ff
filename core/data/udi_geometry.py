"""Where UDI's crops lie and which of their tokens match: pure functions of boxes and draws, for B samples at once.

Corners are (top, left, bottom, right) of the inclusive outermost pixels, divided by (height - 1, width - 1) of the
image, float32. A mirrored crop has its left and right swapped: positions inside it are then mirrored by themselves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


def fitting_boxes(
    area: NDArray[np.float64], log_ratio: NDArray[np.float64], sizes: Ints, ratio: tuple[float, float]
) -> tuple[Ints, Bools]:
    """Height and width (B, 2) of the first of ten attempts (B, 10) that fits, else of the largest allowed centre box.

    area: share of the image's.  log_ratio: of width / height.  sizes: (B, 2).  Returns also (B,) whether one fitted.
    """
    height, width = sizes.T
    target = area * (height * width)[:, None]
    w = np.rint(np.sqrt(target * np.exp(log_ratio)))
    h = np.rint(np.sqrt(target / np.exp(log_ratio)))
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])  # NaN never fits
    rows, first = np.arange(len(w)), fits.argmax(axis=1)
    any_fits = fits.any(axis=1)
    chosen = np.nan_to_num(np.stack([h[rows, first], w[rows, first]], axis=1)).astype(np.int64)
    tallest = np.minimum(height, np.rint(width / ratio[0]).astype(np.int64))
    widest = np.minimum(width, np.rint(height * ratio[1]).astype(np.int64))
    return np.where(any_fits[:, None], chosen, np.stack([tallest, widest], axis=1)), any_fits


def placed(shape: Ints, fitted: Bools, sizes: Ints, unit: NDArray[np.float64]) -> Ints:
    """Boxes (B, 4) of a height and width (B, 2) at a place drawn from [0, 1)^2, in the middle where nothing fitted."""
    room = sizes - shape
    drawn = np.minimum(np.floor(unit * (room + 1)).astype(np.int64), room)
    return np.concatenate([np.where(fitted[:, None], drawn, room // 2), shape], axis=1)


def corners(boxes: Ints, sizes: Ints, flips: Bools | None = None) -> Floats:
    """Boxes (B, 4) top, left, height, width -> corners (B, 4).  flips: (B, 2) upside down, mirrored."""
    top, left, h, w = boxes.T
    height, width = np.maximum(sizes - 1, 1).T
    edges = np.stack([top / height, left / width, (top + h - 1) / height, (left + w - 1) / width], axis=1)
    if flips is not None:
        edges = np.where(np.tile(flips, 2), edges[:, [2, 3, 0, 1]], edges)
    return edges.astype(np.float32)


def upright(corners_B4: Floats) -> Floats:
    """The same regions with top <= bottom and left <= right."""
    first, second = corners_B4[:, :2], corners_B4[:, 2:]
    return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)


def reference(a_B4: Floats, b_B4: Floats) -> Floats:
    """Least upper left and greatest lower right corner of two crops.

    Of upright corners this is their bounding box. The released code takes corners of mirrored crops as they are, where
    it is the bounding box, the columns that both have, or one of the two.
    """
    return np.concatenate([np.minimum(a_B4[:, :2], b_B4[:, :2]), np.maximum(a_B4[:, 2:], b_B4[:, 2:])], axis=1)


def pull(boxes: Ints, reference_B4: Floats, sizes: Ints, released_slip: bool) -> Ints:
    """Boxes (B, 4) moved towards a region (B, 4 corners) until they overlap it by about half of the smaller side.

    Per axis: a box apart from the region moves by the gap and half of the smaller side; one that overlaps by at most
    half of the smaller side moves by that half; then it is clamped to the image. With `released_slip`, the horizontal
    extent begins at the box's row instead of its column, as in the released code: it then may seem too little to a box
    in the region's middle as well, which stays where both centres coincide.
    """
    region = np.rint(upright(reference_B4) * np.tile(sizes - 1, 2).astype(np.float64)).astype(np.int64)
    out = boxes.copy()
    for axis in (0, 1):
        start, side, low, high = boxes[:, axis], boxes[:, axis + 2], region[:, axis], region[:, axis + 2]
        own_start = boxes[:, 0] if released_slip else start
        extent = np.maximum(start + side - 1, high) - np.minimum(own_start, low)
        gap = extent - side - (high - low)
        half = np.minimum(side, high - low) // 2
        shift = np.where(gap >= -half, np.maximum(gap, 0) + half, 0)
        towards = np.sign(low + high - (2 * start + side - 1))  # between centres, in half pixels
        out[:, axis] = np.clip(start + towards * shift, 0, sizes[:, axis] - side)
    return out


def windows(grid: int, window: int) -> int:
    """Windows of that side along one axis of a grid, each of which gives one sampled token."""
    return grid // window


def stratified(inside: Ints, corner_u: NDArray[np.float64], grid: int, window: int) -> Ints:
    """One token per window: tokens (B, n^2) of a grid, in ascending order, n = windows(grid, window).

    inside: (B, n^2) place within each window, row by row.  corner_u: (B,) draw that puts the n windows, which may
    cover less than the grid, into its top left, top right, bottom left or bottom right corner; not looked at else.
    """
    n = windows(grid, window)
    spare = grid - n * window
    corner = np.floor(np.clip(corner_u, 0.0, None) * 4).astype(np.int64) if spare else np.zeros(len(inside), np.int64)
    place = np.arange(n * n)
    rows = place // n * window + inside // window + (corner // 2 * spare)[:, None]
    columns = place % n * window + inside % window + (corner % 2 * spare)[:, None]
    return np.sort(rows * grid + columns, axis=1)


@dataclass(frozen=True)
class Matches:
    """Sampled tokens of one crop and where they lie in another one; matched ones first, zeros behind them."""

    source: Ints  # (B, s) token in the source grid
    valid: Floats  # (B, s) 1 where the token lies inside the target crop, else 0
    target: Ints  # (B, s, 4) the tokens around its place in the target grid
    weight: Floats  # (B, s, 4) their bilinear weights, which sum to `valid`


def match(source_B4: Floats, target_B4: Floats, tokens: Ints, grid: int, target_grid: int) -> Matches:
    """Find sampled tokens (B, s) of a crop in another one, both given by their corners.

    The first token of a grid lies on the crop's first pixel, the last one on its last pixel. A token counts when it is
    strictly inside the other crop. float32 throughout, as in the released code. Grids: tokens along a side, > 1.
    """
    step = np.stack([tokens // grid, tokens % grid], axis=-1).astype(np.float32) / np.float32(grid - 1)
    first, last = source_B4[:, None, :2], source_B4[:, None, 2:]
    place = first + step * (last - first)  # (B, s, 2)
    box = upright(target_B4)[:, None]
    inside = ((place > box[..., :2]) & (place < box[..., 2:])).all(axis=-1)
    first, span = target_B4[:, None, :2], target_B4[:, None, 2:] - target_B4[:, None, :2]
    at = (place - first) / np.where(span == 0, np.float32(1), span) * np.float32(target_grid - 1)
    low = np.clip(np.floor(at), 0, target_grid - 2)
    up = at - low  # (B, s, 2): share of the further row and column
    weight = np.stack([(1 - up[..., 0]) * (1 - up[..., 1]), (1 - up[..., 0]) * up[..., 1],
                       up[..., 0] * (1 - up[..., 1]), up[..., 0] * up[..., 1]], axis=-1)  # fmt: skip
    row, column = low.astype(np.int64)[..., 0], low.astype(np.int64)[..., 1]
    near = (row * target_grid + column)[..., None] + np.array([0, 1, target_grid, target_grid + 1])
    order = np.argsort(~inside, axis=1, kind="stable")
    kept = np.take_along_axis(inside, order, axis=1)
    return Matches(
        np.where(kept, np.take_along_axis(tokens, order, axis=1), 0),
        kept.astype(np.float32),
        np.where(kept[..., None], np.take_along_axis(near, order[..., None], axis=1), np.arange(4)),
        np.where(kept[..., None], np.take_along_axis(weight, order[..., None], axis=1), 0).astype(np.float32),
    )


def between(unit: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    """Draws in [0, 1) spread over [low, high)."""
    return low + (high - low) * unit


def log_range(ratio: tuple[float, float]) -> tuple[float, float]:
    return math.log(ratio[0]), math.log(ratio[1])
