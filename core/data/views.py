"""What networks see of an image: random crops in training, a centre crop in evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from core.data.colour import IMAGENET_MEAN as IMAGENET_MEAN
from core.data.colour import IMAGENET_STD as IMAGENET_STD
from core.data.colour import Colour as Colour
from core.data.colour import apply_colour as apply_colour
from core.data.colour import normalize as normalize
from core.data.draws import uniform

Ints = NDArray[np.int64]
ATTEMPTS = 10  # random boxes tried before the centre crop, as in torchvision


@dataclass(frozen=True)
class View:
    """One random view.  The defaults are UNIC's training augmentation (released code, train transform).

    size: pixels.  scale: share of the area.  ratio: width / height.  flip, jitter, gray, blur, solarise: probabilities.
    brightness, contrast, saturation: factors in [1 - x, 1 + x].  hue: shift in turns, [-x, x].  blur_sigma: pixels.
    box_passes: above 0, the blur is Pillow's, of that many box filters.  calm: share of samples that are never
    solarised, and their own probability of a blur.  resize: pixels of the short side before the crop, 0 = as it is.
    interpolation: bicubic or bilinear.
    rand_augment: a policy in timm's notation, applied to the crop.  erase: probability of noise in a box of the image.
    """

    size: int
    name: str = "image"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    gray: float = 0.2
    blur: float = 0.2
    blur_kernel: int = 9
    blur_sigma: tuple[float, float] = (0.1, 5.0)
    solarise: float = 0.2
    box_passes: int = 0
    calm: tuple[float, float] = (0.0, 0.0)
    resize: int = 0
    interpolation: str = "bicubic"
    rand_augment: str = ""
    erase: float = 0.0


@dataclass(frozen=True)
class Cropped:
    """Where the views of B samples are cut out."""

    boxes: dict[str, Ints]  # View.name -> (B, 4) top, left, height, width inside the image
    flips: dict[str, NDArray[np.bool_]]  # View.name -> (B,)
    extra: dict[str, NDArray[Any]]  # whatever else of the geometry the method needs, (B, ...)


class Crops(Protocol):
    """A method's cropping: a picklable pure function of its arguments. sizes: (B, 2) height and width."""

    def __call__(self, seed: int, epoch: int, samples: Ints, sizes: Ints) -> Cropped: ...


@dataclass(frozen=True)
class RandomCrops:
    """Every view on its own, by `crop_boxes`."""

    views: Sequence[View]

    def __call__(self, seed: int, epoch: int, samples: Ints, sizes: Ints) -> Cropped:
        found = {view.name: crop_boxes(view, seed, epoch, samples, i, sizes) for i, view in enumerate(self.views)}
        return Cropped({name: boxes for name, (boxes, _) in found.items()},
                       {name: flips for name, (_, flips) in found.items()}, {})  # fmt: skip


def crop_boxes(
    view: View, seed: int, epoch: int, samples: Ints, view_index: int, sizes: Ints
) -> tuple[Ints, NDArray[np.bool_]]:
    """Where to crop each sample and whether to mirror it.

    samples: (B,) indices.  sizes: (B, 2) height and width.  Returns boxes (B, 4) top, left, height, width inside the
    image, and flips (B,) bool.  Area and log ratio are uniform in view.scale and view.ratio; after ten boxes that do
    not fit, the largest centre crop of an allowed ratio (the distribution of torchvision's RandomResizedCrop).
    """
    draws = uniform(seed, epoch, samples, 2 * view_index, 2 * ATTEMPTS + 3)
    area, ratio, (top, left, flip) = draws[:, :ATTEMPTS], draws[:, ATTEMPTS : 2 * ATTEMPTS], draws[:, 2 * ATTEMPTS :].T
    height, width = np.asarray(sizes, np.int64).T
    target = (height * width)[:, None] * _between(area, *view.scale)
    aspect = np.exp(_between(ratio, math.log(view.ratio[0]), math.log(view.ratio[1])))
    w = np.rint(np.sqrt(target * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(target / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    rows, first = np.arange(len(w)), fits.argmax(axis=1)
    h, w = h[rows, first], w[rows, first]
    corner = np.floor([top * (height - h + 1), left * (width - w + 1)]).astype(np.int64)
    boxes = np.stack([*corner, h, w], axis=1)
    boxes = np.where(fits.any(axis=1)[:, None], boxes, _centre_boxes(height, width, view.ratio))
    return boxes, flip < view.flip


def _centre_boxes(height: Ints, width: Ints, ratio: tuple[float, float]) -> Ints:
    """(B, 4): the largest centred box whose ratio is allowed."""
    w = np.minimum(width, np.rint(height * ratio[1]).astype(np.int64)).clip(min=1)
    h = np.minimum(height, np.rint(width / ratio[0]).astype(np.int64)).clip(min=1)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


def _between(unit: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * unit


def random_resized_crop(
    image: torch.Tensor, box: Ints, flip: bool, size: int, interpolation: str = "bicubic"
) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): crop, resize (antialiased), mirror.  box: from crop_boxes."""
    top, left, height, width = (int(edge) for edge in box)
    part = image[None, :, top : top + height, left : left + width]
    if height == width == size:  # torchvision has it as it is
        return part[0].flip(-1) if flip else part[0]
    # As torchvision's resized_crop, whose own checks take a tenth of the time.
    crop: torch.Tensor = interpolate(part, (size, size), mode=interpolation, antialias=True)[0]
    return crop.flip(-1) if flip else crop


def shorten(image: torch.Tensor, side: int) -> torch.Tensor:
    """uint8 (3, H, W) with its short side at `side` pixels (bicubic, antialiased); 0 leaves it as it is."""
    if not side:
        return image
    resized: torch.Tensor = functional.resize(image, [side], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized


def draw_colour(view: View, seed: int, epoch: int, samples: Ints, view_index: int) -> Colour:
    """Colour draws of one view for samples (B,)."""
    draws = uniform(seed, epoch, samples, 2 * view_index + 1, 14).T
    jit, keys, amounts, (gray, blur, sigma, solarise, calm) = draws[0], draws[1:5], draws[5:9], draws[9:]
    is_calm = calm < view.calm[0]
    reach = np.array([view.brightness, view.contrast, view.saturation, view.hue])
    low = np.append(np.maximum(0.0, 1.0 - reach[:3]), -reach[3])
    high = np.append(1.0 + reach[:3], reach[3])
    order = np.argsort(keys.T, axis=1, kind="stable")
    return Colour(
        jit=jit < view.jitter,
        order=np.where(reach[order] > 0, order, -1),
        factors=low + (high - low) * amounts.T,
        gray=gray < view.gray,
        sigma=np.where(blur < np.where(is_calm, view.calm[1], view.blur), _between(sigma, *view.blur_sigma), np.nan),
        solarise=(solarise < view.solarise) & ~is_calm,
        kernel=view.blur_kernel,
        box_passes=view.box_passes,
    )


def centre_crop(image: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): short side to `size` (bicubic, antialiased), no margin, centre crop."""
    crop: torch.Tensor = functional.center_crop(shorten(image, size), [size, size])
    return crop


def eval_tensor(image: torch.Tensor, size: int) -> torch.Tensor:
    """UNIC's validation transform: uint8 (3, H, W) -> float32 (3, size, size), normalised; resized as a tensor."""
    return normalize(centre_crop(image, size))


def center_pad(height: int, width: int, multiple: int) -> tuple[int, int, int, int, int, int]:
    """Zero border that makes both sides multiples of a patch size: (height, width, top, bottom, left, right).

    An odd pixel goes to the bottom or right.
    """
    tall, wide = (-(-side // multiple) * multiple for side in (height, width))
    top, left = (tall - height) // 2, (wide - width) // 2
    return tall, wide, top, tall - height - top, left, wide - width - left
