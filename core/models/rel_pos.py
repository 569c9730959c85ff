"""Relative-position biases of BEiT-style ViTs: the index, the bias ready for fused attention, tables of other grids."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from timm.models.beit import RelativePositionBias
from torch import Tensor, nn

Grid = tuple[int, int]
Floats = NDArray[np.float64]
ALIGN = 8  # elements: rows of a bias must start at multiples of it, or fused attention copies the bias in every block
CLS_ROWS = 3  # of a table with a class token: class to patch, patch to class, class to class


def relative_index(grid: Grid, cls: bool = True) -> Tensor:
    """Table row for query i and key j, int64 (N, N) with N = rows * columns, one more with a class token in front.

    Patches: (r_i - r_j + rows - 1)(2 columns - 1) + (c_i - c_j + columns - 1). With n = (2 rows - 1)(2 columns - 1):
    class to patch n, patch to class n + 1, class to class n + 2 (Feature-Distillation notes, section 3).
    """
    rows, columns = grid
    r, c = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    index = (r[:, None] - r + rows - 1) * (2 * columns - 1) + (c[:, None] - c + columns - 1)
    if not cls:
        return index
    n = (2 * rows - 1) * (2 * columns - 1)
    index = nn.functional.pad(index, (1, 0, 1, 0), value=n)
    index[1:, 0] = n + 1
    index[0, 0] = n + 2
    return index


def index_for(table_RH: Tensor, grid: Grid) -> Tensor:
    """`relative_index` of the tokens that a table has rows for, where the table is."""
    rows, columns = grid
    return relative_index(grid, cls=len(table_RH) > (2 * rows - 1) * (2 * columns - 1)).to(table_RH.device)


def relative_bias(table_RH: Tensor, index_NN: Tensor) -> Tensor:
    """Biases (H, N, N) of a table (R, H), added to the scores of attention after their scaling.

    Rows are gathered into memory that is a multiple of ALIGN long: fused kernels take the bias as it is.
    """
    tokens = index_NN.shape[1]
    padded = nn.functional.pad(index_NN, (0, -tokens % ALIGN))
    return table_RH[padded].permute(2, 0, 1).contiguous()[..., :tokens]


class SharedBias(nn.Module):
    """One table for all blocks, under timm's name; stands in for `Beit.rel_pos_bias`. forward: () -> (H, N, N)."""

    index: Tensor

    def __init__(self, table_RH: nn.Parameter, grid: Grid) -> None:
        super().__init__()
        self.relative_position_bias_table = table_RH
        self.register_buffer("index", index_for(table_RH, grid), persistent=False)

    @classmethod
    def of(cls, own: RelativePositionBias) -> SharedBias:
        """With the table of timm's module."""
        rows, columns = own.window_size
        return cls(own.relative_position_bias_table, (rows, columns))

    def forward(self) -> Tensor:
        return relative_bias(self.relative_position_bias_table, self.index)


def resize_table(table_RH: Tensor, old_grid: Grid, grid: Grid) -> Tensor:
    """A table for another grid of patches, (R, H) -> (R', H) in the table's dtype.

    The old rows stand at geometrically spaced offsets 0, +-1, +-(1 + q), ... that reach as far as the new grid, so that
    near offsets keep their biases; a cubic not-a-knot spline on both axes is read at whole offsets and held constant
    outside. Rows beyond the offsets (class token) are copied (Feature-Distillation notes, section 7).
    """
    if old_grid == grid:
        return table_RH
    old, new = ([2 * side - 1 for side in each] for each in (old_grid, grid))
    places = old[0] * old[1]
    image = table_RH[:places].detach().cpu().double().numpy().reshape(*old, -1)
    for axis in (0, 1):
        at = geometric_offsets(old[axis] // 2, new[axis] // 2)
        image = np.moveaxis(_spline(at, np.moveaxis(image, axis, 0), _whole_offsets(new[axis])), 0, axis)
    resized = torch.from_numpy(np.ascontiguousarray(image)).flatten(0, 1).to(table_RH)
    return torch.cat([resized, table_RH[places:]])


def geometric_offsets(old_reach: int, new_reach: int) -> Floats:
    """Ascending offsets of 2 old_reach + 1 rows: sums of 1, q, q^2, ... with the q for which they reach new_reach."""
    q = growth(old_reach, new_reach)
    half = np.cumsum(q ** np.arange(old_reach))
    return np.concatenate([-half[::-1], [0.0], half])


def growth(terms: int, reach: int, low: float = 1.01, high: float = 1.5, tolerance: float = 1e-6) -> float:
    """The q with (1 - q^terms) / (1 - q) = reach, by bisection as released: within [low, high], the last midpoint."""
    q = low
    while high - low > tolerance:
        q = (low + high) / 2
        if (1 - q**terms) / (1 - q) > reach:
            high = q
        else:
            low = q
    return q


def _whole_offsets(count: int) -> Floats:
    return np.arange(count, dtype=np.float64) - count // 2


def _spline(x_n: Floats, y_nK: NDArray[np.float64], at_m: Floats) -> NDArray[np.float64]:
    """Not-a-knot cubic spline through (x, y) along the first axis, read at `at`, clamped to the range of x."""
    degree = min(3, len(x_n) - 1)
    if degree < 1:
        return np.repeat(y_nK, len(at_m), axis=0)
    inner = x_n[2:-2] if degree == 3 else x_n[:0]
    knots = np.concatenate([[x_n[0]] * (degree + 1), inner, [x_n[-1]] * (degree + 1)])
    coefficients = np.linalg.solve(_basis(x_n, knots, degree), y_nK.reshape(len(x_n), -1))
    values = _basis(at_m.clip(x_n[0], x_n[-1]), knots, degree) @ coefficients
    return np.asarray(values.reshape(len(at_m), *y_nK.shape[1:]), np.float64)


def _basis(x_m: Floats, knots: Floats, degree: int) -> Floats:
    """B-spline basis (m, len(knots) - degree - 1) by the recursion of Cox and de Boor."""
    x = x_m[:, None]
    last = np.searchsorted(knots, knots[-1], side="left") - 1  # the last interval that is not empty is closed
    span = np.minimum(np.searchsorted(knots, x_m, side="right") - 1, last)
    basis: Floats = (np.arange(len(knots) - 1) == span[:, None]).astype(np.float64)
    for k in range(1, degree + 1):
        left, right = knots[: -k - 1], knots[k + 1 :]
        rise, fall = knots[k:-1] - left, right - knots[1:-k]
        with np.errstate(divide="ignore", invalid="ignore"):
            up = np.where(rise > 0, (x - left) / rise, 0.0)
            down = np.where(fall > 0, (right - x) / fall, 0.0)
        basis = np.asarray(up * basis[:, :-1] + down * basis[:, 1:], np.float64)
    return basis
