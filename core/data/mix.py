"""Mix-up and CutMix of whole batches with smoothed labels: a batch is mixed with itself in reverse order.

Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; conventions of timm's batch mode (Feature-Distillation
notes, section 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[int, int, int, int]  # top, bottom, left, right
BETA_ATTEMPTS = 128  # of the rejection below: for alpha <= 2 all fail less than once in 10**9 batches
DRAWS = 2 * BETA_ATTEMPTS + 3


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed.  share: of the image itself, 1 leaves all as it is.  box: pasted over (None: blended)."""

    share: float
    box: Box | None = None


def draw_mix(u: NDArray[np.float64], size: tuple[int, int], mixup: float, cutmix: float, switch: float) -> Mix:
    """Mix-up or, with probability `switch`, CutMix; the share is Beta(alpha, alpha) with the alpha of either.

    u: DRAWS uniform draws.  size: height and width.  mixup, cutmix: alphas in 0..2; 0 turns one off, both 0 mixing.
    """
    pastes = cutmix > 0 and (mixup == 0 or u[0] < switch)
    alpha = cutmix if pastes else mixup
    if alpha == 0:
        return Mix(1.0)
    share = beta(alpha, u[3:])
    return cut_box(share, size, (u[1], u[2])) if pastes else Mix(share)


def beta(alpha: float, u: NDArray[np.float64]) -> float:
    """Beta(alpha, alpha) from pairs of uniform draws by Joehnk's rejection."""
    x, y = u[: len(u) // 2] ** (1 / alpha), u[len(u) // 2 :] ** (1 / alpha)
    kept = np.flatnonzero((x + y <= 1) & (x + y > 0))
    return float(x[kept[0]] / (x[kept[0]] + y[kept[0]])) if len(kept) else 0.5


def cut_box(share: float, size: tuple[int, int], centre: tuple[float, float]) -> Mix:
    """A box of 1 - share of the area around a uniform centre (in 0..1), cut at the borders; the share follows it."""
    edges = []
    for side, at in zip(size, centre, strict=True):
        half, middle = int(side * math.sqrt(1 - share)) // 2, int(at * side)
        edges += [max(middle - half, 0), min(middle + half, side)]
    top, bottom, left, right = edges
    return Mix(pasted_share((top, bottom, left, right), size), (top, bottom, left, right))


def pasted_share(box: Box, size: tuple[int, int]) -> float:
    """Share of an image that a box pasted over it leaves."""
    top, bottom, left, right = box
    return 1 - (bottom - top) * (right - left) / (size[0] * size[1])


def mix_images(x_BCHW: Tensor, mix: Mix) -> Tensor:
    """The batch mixed with itself in reverse order; a new tensor unless the share is 1."""
    if mix.share == 1:
        return x_BCHW
    if mix.box is None:
        return x_BCHW * mix.share + x_BCHW.flip(0) * (1 - mix.share)
    top, bottom, left, right = mix.box
    out = x_BCHW.clone()
    out[:, :, top:bottom, left:right] = x_BCHW.flip(0)[:, :, top:bottom, left:right]
    return out


def mix_labels(labels_B: Tensor, num_classes: int, share: float, smoothing: float) -> Tensor:
    """Soft targets (B, C) float32: smoothed first, mixed then.  off = smoothing / C, on = 1 - smoothing + off."""
    off = smoothing / num_classes
    soft_BC = torch.full((len(labels_B), num_classes), off, device=labels_B.device)
    soft_BC.scatter_(1, labels_B[:, None], 1 - smoothing + off)
    return soft_BC if share == 1 else soft_BC * share + soft_BC.flip(0) * (1 - share)
