"""Transforms with Pillow's resize, as the released code of several methods has them; tensors differ by a grey level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from core.data.colour import IMAGENET_MEAN, IMAGENET_STD

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NORMS = {"imagenet": (IMAGENET_MEAN, IMAGENET_STD), "clip": (CLIP_MEAN, CLIP_STD)}
MARGIN = 256 / 224  # of the short side over the crop in the released evaluations


def crop_pil(image: Tensor, box: Sequence[int], flip: bool, size: int, interpolation: str = "bilinear") -> Tensor:
    """A training crop: uint8 (3, H, W) -> uint8 (3, size, size).  box: top, left, height, width."""
    top, left, height, width = (int(edge) for edge in box)
    crop = functional.resized_crop(
        functional.to_pil_image(image), top, left, height, width, [size, size], InterpolationMode(interpolation)
    )
    pixels: Tensor = functional.pil_to_tensor(functional.horizontal_flip(crop) if flip else crop)
    return pixels


def resize_pil(image: Tensor, size: list[int], interpolation: str = "bicubic") -> Tensor:
    """uint8 (3, H, W) with its short side at size[0] pixels; two sizes squash it to that height and width."""
    resized = functional.resize(functional.to_pil_image(image), size, InterpolationMode(interpolation))
    pixels: Tensor = functional.pil_to_tensor(resized)
    return pixels


def eval_pil(
    image: Tensor, size: int, resize: int = 0, interpolation: str = "bicubic", norm: str = "imagenet"
) -> Tensor:
    """Short side to `resize` pixels, centre crop: uint8 (3, H, W) -> float32 (3, size, size).

    resize: 0 stands for int(256 / 224 * size).  norm: a key of NORMS; Feature-Distillation evaluates all with `clip`.
    """
    return standardised(whole_pil(image, size, resize or int(MARGIN * size), interpolation), norm)


def whole_pil(image: Tensor, size: int, resize: int, interpolation: str = "bicubic") -> Tensor:
    """Short side to `resize` pixels, centre crop: uint8 (3, H, W) -> (3, size, size)."""
    cropped: Tensor = functional.center_crop(resize_pil(image, [resize], interpolation), [size, size])
    return cropped


def standardised(image: Tensor, norm: str) -> Tensor:
    """uint8 (..., 3, H, W) -> float32 by the mean and deviation of this name."""
    mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in NORMS[norm])
    return (image.float() / 255 - mean) / std


def clipped_sizes(sizes: Ints, area_B: Floats, log_aspect_B: Floats) -> Ints:
    """Height and width (B, 2) of crops of a share of the area and a log ratio, cut down to the image: no second try.

    sizes: (B, 2) height and width.  The crop of linear probes, which always has an area (the tf.data convention).
    """
    target = sizes[:, 0] * sizes[:, 1] * area_B
    aspect = np.exp(log_aspect_B)
    wanted = np.stack([np.rint(np.sqrt(target / aspect)), np.rint(np.sqrt(target * aspect))], axis=1)
    return np.minimum(wanted.astype(np.int64), sizes).clip(min=1)


def clipped_boxes(
    sizes: Ints,
    u_B4: Floats,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Ints:
    """Boxes (B, 4) top, left, height, width from uniform draws (B, 4) for area, log ratio, top and left."""
    area = scale[0] + (scale[1] - scale[0]) * u_B4[:, 0]
    low, high = (math.log(edge) for edge in ratio)
    crop = clipped_sizes(sizes, area, low + (high - low) * u_B4[:, 1])
    corner = np.floor(u_B4[:, 2:] * (sizes - crop + 1)).astype(np.int64)
    return np.concatenate([corner, crop], axis=1)
