"""Crops drawn from a seeded torch generator and made with Pillow, as released training code has them: for comparison.

Runs draw by key instead (`core.data.views`); the distribution is the same, and pixels differ by a grey level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional

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


def shorten_pil(image: Tensor, side: int) -> Tensor:
    """uint8 (3, H, W) with its short side at `side` pixels, by Pillow's bicubic resize."""
    resized = functional.resize(functional.to_pil_image(image), [side], InterpolationMode.BICUBIC)
    pixels: Tensor = functional.pil_to_tensor(resized)
    return pixels


def crop_pil(image: Tensor, box: Sequence[int], flip: bool, size: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): cut out, resized by Pillow's bilinear filter, mirrored."""
    top, left, height, width = (int(edge) for edge in box)
    crop = functional.resized_crop(
        functional.to_pil_image(image), top, left, height, width, [size, size], InterpolationMode.BILINEAR
    )
    pixels: Tensor = functional.pil_to_tensor(functional.horizontal_flip(crop) if flip else crop)
    return pixels


def squash_pil(image: Tensor, size: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): resized as a whole by Pillow's bicubic filter, whatever its shape.

    How the toolkit prepares KITTI-distance, where a centre crop would cut off what is asked for.
    """
    resized = functional.resize(functional.to_pil_image(image), [size, size], InterpolationMode.BICUBIC)
    pixels: Tensor = functional.pil_to_tensor(resized)
    return pixels
