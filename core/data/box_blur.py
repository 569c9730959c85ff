"""Pillow's Gaussian blur of a whole batch on its device: repeated box filters, rounded to grey levels in between.

It differs from a sampled Gaussian by up to three grey levels, most of all for small radii (UDI's release uses it).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

UNIT = float(1 << 24)  # of Pillow's fixed-point weights


def box_taps(sigma: NDArray[np.float64], passes: int) -> NDArray[np.float64]:
    """Weights (b, k) of the boxes of fractional width whose `passes`-fold application spreads like these Gaussians.

    In whole numbers of 1 / UNIT, rounded as Pillow does: a radius of 1 has ties everywhere.
    A box has radius l + a: weight 1 / (2 (l + a) + 1) within l pixels, and the rest shared by the two pixels beyond.
    """
    spread = sigma**2 / passes
    whole = np.floor((np.sqrt(12.0 * spread + 1.0) - 1.0) / 2.0)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * spread) / (6.0 * (spread - (whole + 1.0) ** 2))
    offset = np.abs(np.arange(-whole.max(initial=0.0) - 1.0, whole.max(initial=0.0) + 2.0))
    inner = np.floor(np.float32(UNIT) / (2.0 * (whole + part) + 1.0).astype(np.float32)).astype(np.float64)
    outer = np.floor((UNIT - (2.0 * whole + 1.0) * inner) / 2.0)
    columns = np.where(offset <= whole[:, None], inner[:, None], 0.0)
    return np.where(offset == whole[:, None] + 1.0, outer[:, None], columns)


def box_blur(images: Tensor, taps: Tensor, passes: int) -> Tensor:
    """float (b, 3, H, W) in [0, 1] on grey levels of 1/255, taps (b, k) -> the same; borders repeat."""
    # In float64, products with weights are exact, so ties go where Pillow's go.
    return box_filter((images.double() * 255.0).round_(), taps, passes).to(images.dtype) / 255.0


def box_filter(levels: Tensor, taps: Tensor, passes: int) -> Tensor:
    """Whole grey levels (b, 3, H, W) of any float type, taps (b, k) -> the same."""
    half = taps.shape[1] // 2
    weights = taps.to(levels.dtype).view(*taps.shape, 1, 1, 1).unbind(1)
    for dim in (-1, -2):
        border = (half, half, 0, 0) if dim == -1 else (0, 0, half, half)
        for _ in range(passes):
            padded, size = pad(levels, border, mode="replicate"), levels.shape[dim]
            total = torch.full_like(levels, UNIT / 2)
            for k, weight in enumerate(weights):
                total.addcmul_(padded.narrow(dim, k, size), weight)
            levels = total.div_(UNIT).floor_()
    return levels
