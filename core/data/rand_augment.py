"""RandAugment and random erasing, with draws that a sample's key alone decides."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data import auto_augment
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms.v2 import functional

from core.data.colour import IMAGENET_MEAN
from core.data.draws import uniform

ERASE_DRAW = 2000  # key of erasing draws, apart from those of the views
ERASE_AREA, ERASE_RATIO, ERASE_ATTEMPTS = (0.02, 1 / 3), 0.3, 10


@cache
def policy_of(policy: str, size: int) -> Any:
    """timm's transform as its training pipeline builds it for images of this size: bicubic, filled with the mean."""
    fill = tuple(min(255, round(255 * mean)) for mean in IMAGENET_MEAN)
    transform = rand_augment_transform(
        policy, {"translate_const": int(size * 0.45), "img_mean": fill, "interpolation": Image.Resampling.BICUBIC}
    )
    for operation in transform.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **others: Any) -> Image.Image:
    """timm asks for no bits at its largest magnitude: black, as before Pillow 13, which refuses it."""
    return ImageOps.posterize(image, min(bits_to_keep, 8)) if bits_to_keep else image.point([0] * 256 * 3)


@contextmanager
def lent_generators() -> Iterator[Callable[[tuple[int, int, int, int]], None]]:
    """timm draws from the global generators: for a while they belong to the keys that the yielded function is given."""

    def belong_to(key: tuple[int, int, int, int]) -> None:
        word = int(uniform(key[0], key[1], np.array([key[2]]), -1 - key[3], 1)[0, 0] * 2**32)
        random.seed(word)
        np.random.seed(word)

    states = random.getstate(), np.random.get_state()
    try:
        yield belong_to
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def rand_augment(image: Tensor, policy: str, key: tuple[int, int, int, int]) -> Tensor:
    """uint8 (3, S, S) -> uint8 (3, S, S) by timm's RandAugment.

    policy: timm's notation, such as rand-m9-mstd0.5-inc1.  key: seed, epoch, sample, view.
    """
    with lent_generators() as belong_to:
        belong_to(key)
        augmented = policy_of(policy, image.shape[-1])(functional.to_pil_image(image))
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

    Boxes and noise are keyed by sample, so that an image looks the same in whatever batch it is.
    """
    out, device = images.clone(), images.device
    boxes = erase_boxes(
        probability, images.shape[-1], uniform(seed, epoch, samples, ERASE_DRAW, 1 + 4 * ERASE_ATTEMPTS)
    )
    for row in np.flatnonzero(boxes[:, 2]).tolist():
        top, left, height, width = boxes[row].tolist()
        generator = torch.Generator(device).manual_seed(zlib.crc32(np.array([seed, epoch, samples[row]]).tobytes()))
        noise = torch.randn(3, height, width, generator=generator, device=device)
        out[row, :, top : top + height, left : left + width] = noise.to(images.dtype)
    return out
