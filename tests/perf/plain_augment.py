"""What each release does to an image on the CPU, file to normalised float tensors, with Pillow and torchvision or timm.

Pillow decodes, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from core.data.colour import IMAGENET_MEAN, IMAGENET_STD
from core.data.udi_crops import GLOBALS, LinkedCrops, Linking

NORMAL = (IMAGENET_MEAN, IMAGENET_STD)
BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
LOCALS = 10
Plain = Callable[[bytes], list[Tensor]]


def unic() -> Plain:
    """torchvision v2 on uint8 tensors."""
    chain = v2.Compose([
        v2.ToImage(), v2.RandomResizedCrop(224, (0.08, 1.0), interpolation=BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(), v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.ToDtype(torch.float32, scale=True), v2.RandomApply([v2.GaussianBlur(9, (0.1, 5.0))], 0.2),
        v2.RandomSolarize(0.5, 0.2), v2.Normalize(*NORMAL),
    ])  # fmt: skip
    return lambda data: [chain(opened(data))]


def fd() -> Plain:
    chain = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.08, 1.0), interpolation=BILINEAR), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(*NORMAL),
    ])  # fmt: skip
    return lambda data: [chain(opened(data))]


def proteus() -> Plain:
    chain = create_transform(
        224, is_training=True, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
        re_prob=0.25, re_mode="pixel", re_count=1, mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip

    def plain(data: bytes) -> list[Tensor]:
        image = opened(data)
        while True:
            try:
                return [chain(image)]
            except ValueError:  # Pillow 13 refuses the posterizing to no bits that timm asks for now and then
                pass

    return plain


def udi() -> Plain:
    """Boxes and matched tokens are those of core.data.udi_crops, worked out for one image at a time."""
    chain = transforms.Compose([
        transforms.RandomHorizontalFlip(), transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2), _blurred_or_solarised, transforms.ToTensor(), transforms.Normalize(*NORMAL),
    ])  # fmt: skip
    linked = LinkedCrops(Linking(14, 6), LOCALS, (0.25, 1.0), (0.05, 0.25), 3, 2)

    def plain(data: bytes) -> list[Tensor]:
        image = opened(data)
        sample = np.array([random.randrange(1 << 30)])
        found = linked(0, 0, sample, np.array([[image.height, image.width]]))
        views = []
        for name, ((top, left, height, width),) in found.boxes.items():
            side = [224, 224] if name in GLOBALS else [96, 96]
            views.append(chain(functional.resized_crop(image, top, left, height, width, side, BICUBIC)))
        return [*views, *(torch.from_numpy(array) for array in found.extra.values())]

    return plain


def _blurred_or_solarised(image: Image.Image) -> Image.Image:
    if random.random() < 0.5:
        return _blurred(image) if random.random() < 0.75 else image  # always, or with probability 0.5
    image = _blurred(image) if random.random() < 0.1 else image
    return ImageOps.solarize(image) if random.random() < 0.2 else image


def _blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")
