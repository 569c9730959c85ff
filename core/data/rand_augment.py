"""RandAugment and random erasing, with draws that a sample's key alone decides."""

from __future__ import annotations

import math
import random
import zlib
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional

from core.data.colour import IMAGENET_MEAN, to_device
from core.data.draws import uniform

ERASE_DRAW = 2000  # key of erasing draws, apart from those of the views
ERASE_AREA, ERASE_RATIO, ERASE_ATTEMPTS = (0.02, 1 / 3), 0.3, 10


@cache
def _policy(policy: str, size: int) -> Any:
    fill = tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN)
    return rand_augment_transform(policy, {"translate_const": int(size * 0.45), "img_mean": fill})


def rand_augment(image: Tensor, policy: str, key: tuple[int, int, int, int]) -> Tensor:
    """uint8 (3, S, S) -> uint8 (3, S, S) by timm's RandAugment; timm draws from the global generators, which are lent.

    policy: timm's notation, such as rand-m9-mstd0.5-inc1.  key: seed, epoch, sample, view.
    """
    states = random.getstate(), np.random.get_state()
    word = int(uniform(key[0], key[1], np.array([key[2]]), -1 - key[3], 1)[0, 0] * 2**32)
    random.seed(word)
    np.random.seed(word)
    try:
        augmented = _policy(policy, image.shape[-1])(functional.to_pil_image(image))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    out: Tensor = functional.pil_to_tensor(augmented)
    return out


def erase_boxes(probability: float, size: int, draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Boxes (B, 4) top, left, height, width to erase, height 0 where none.  draws: (B, 1 + 4 * ERASE_ATTEMPTS).

    Share of the area uniform in 2-33 %, log ratio uniform in 0.3-1/0.3; the first of ten boxes that fits.
    """
    boxes = np.zeros((len(draws), 4), np.int64)
    tries = draws[:, 1:].reshape(len(draws), ERASE_ATTEMPTS, 4)
    for row in np.flatnonzero(draws[:, 0] < probability):
        for area, ratio, top, left in tries[row]:
            target = size * size * (ERASE_AREA[0] + (ERASE_AREA[1] - ERASE_AREA[0]) * area)
            aspect = math.exp((2 * ratio - 1) * math.log(1 / ERASE_RATIO))
            height, width = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < height < size and 0 < width < size:
                boxes[row] = int(top * (size - height + 1)), int(left * (size - width + 1)), height, width
                break
    return boxes


def erase(images: Tensor, probability: float, seed: int, epoch: int, samples: NDArray[np.int64]) -> Tensor:
    """Normalised images (B, 3, S, S) with one box of standard normal noise per chosen image (mode `pixel` of timm).

    Boxes are keyed by sample; the noise by the micro-batch's samples, as it is drawn on the device in one piece.
    """
    side, device = images.shape[-1], images.device
    boxes = erase_boxes(probability, side, uniform(seed, epoch, samples, ERASE_DRAW, 1 + 4 * ERASE_ATTEMPTS))
    top, left, height, width = to_device(boxes, device).view(-1, 4, 1).unbind(1)  # (B, 1)
    place = torch.arange(side, device=device)
    rows, columns = (place >= top) & (place < top + height), (place >= left) & (place < left + width)  # (B, S)
    inside = (rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1)  # (B, 1, S, S)
    key = zlib.crc32(np.array([seed, epoch, *samples]).tobytes())
    noise = torch.randn(images.shape, generator=torch.Generator(device).manual_seed(key), device=device)
    return torch.where(inside, noise.to(images.dtype), images)
