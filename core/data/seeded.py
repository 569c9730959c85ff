"""Crops drawn from a seeded torch generator, as released training code draws them: to compare with a recorded run.

Runs draw by key instead (`core.data.views`); the distribution is the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms import RandomResizedCrop

Ints = NDArray[np.int64]
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def seeded_boxes(
    seed: int,
    count: int,
    size: tuple[int, int],
    scale: Sequence[float] = SCALE,
    ratio: Sequence[float] = RATIO,
) -> Ints:
    """(count, 4) top, left, height, width: consecutive random crops of an image of `size` (height, width)."""
    image = torch.empty(1, *size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        boxes = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)]
    return np.array(boxes, np.int64)


def seeded_crop(
    seed: int,
    size: tuple[int, int],
    scale: Sequence[float] = SCALE,
    ratio: Sequence[float] = RATIO,
    flip: float = 0.5,
) -> tuple[Ints, bool]:
    """Box (4,) and flip of one image of `size` (height, width), drawn in this order from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        box = RandomResizedCrop.get_params(torch.empty(1, *size), list(scale), list(ratio))
        return np.array(box, np.int64), bool(torch.rand(1) < flip)
