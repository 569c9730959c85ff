"""Colour augmentation of a whole batch on its device, with every sample's own draws.

Equal to torchvision's v2 transforms on uint8 images, which truncate after every operation: products, sums and
truncations are done in the order and precision in which torchvision does them on CPU, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.data.box_blur import box_blur, box_taps

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SOLARISE_THRESHOLD = 0.5
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Colour:
    """Draws for B samples, on the CPU.

    jit (B,) bool: jitter at all.  order (B, 4): operations 0 brightness, 1 contrast, 2 saturation, 3 hue, first to
    last; -1 nothing.  factors (B, 4): factor of operation k (hue: shift in turns).  gray (B,) bool.
    sigma (B,): of the blur in pixels, NaN for none.  solarise (B,) bool.  kernel: width of the blur in pixels, odd.
    box_passes: 0, or how often to apply Pillow's box filter instead; greys are then
    rounded, as Pillow's are.
    """

    jit: NDArray[np.bool_]
    order: NDArray[np.int64]
    factors: NDArray[np.float64]
    gray: NDArray[np.bool_]
    sigma: NDArray[np.float64]
    solarise: NDArray[np.bool_]
    kernel: int = 9
    box_passes: int = 0


def apply_colour(images: torch.Tensor, colour: Colour) -> torch.Tensor:
    """Jitter, grey, blur, solarise and normalise (UNIC's training augmentation, in this order).

    images: uint8 (B, 3, H, W) on any device, not changed; H and W above half the blur kernel.
    Returns float32 (B, 3, H, W), ImageNet-normalised.  Which samples an operation touches is worked out on the CPU, so
    nothing waits for the device.
    """
    device = images.device
    blurred = np.flatnonzero(~np.isnan(colour.sigma))
    picks = [np.flatnonzero(colour.jit & (column == op)) for column in colour.order.T for op in range(len(JITTER))]
    picks += [np.flatnonzero(colour.gray), blurred, np.flatnonzero(colour.solarise)]
    edges = np.cumsum([len(samples) for samples in picks])[:-1].tolist()
    *jitter, gray, blur, solarise = to_device(np.concatenate(picks), device).tensor_split(edges)
    factors = to_device(np.nan_to_num(colour.factors), device).unbind(1)
    sigma, passes = colour.sigma[blurred], colour.box_passes
    taps = to_device(box_taps(sigma, passes) if passes else gaussian_taps(sigma, colour.kernel), device)

    for k, samples in enumerate(jitter):
        op = k % len(JITTER)
        images = _on(images, samples, partial(JITTER[op], factors=factors[op].index_select(0, samples)))
    rounding = 0.5 if colour.box_passes else 0.0
    images = _on(images, gray, lambda x: (_luma(x) + rounding).to(torch.uint8).expand_as(x))
    floats = images.to(torch.float32).mul_(1.0 / 255)
    floats = _on(floats, blur, lambda x: box_blur(x, taps, passes) if passes else gaussian_blur(x, taps))
    floats = _on(floats, solarise, lambda x: torch.where(x >= SOLARISE_THRESHOLD, 1.0 - x, x))
    return _normalize_(floats)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """(..., 3, H, W) uint8, or float in [0, 1], to float32 with ImageNet's mean 0 and deviation 1 per channel."""
    scaled = images.to(torch.float32).mul_(1.0 / 255) if images.dtype == torch.uint8 else images.float().clone()
    return _normalize_(scaled)


def _normalize_(images: torch.Tensor) -> torch.Tensor:
    # By channel with plain numbers: constant tensors would have to be copied to the device at every call.
    for channel, mean, std in zip(images.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.sub_(mean).div_(std)
    return images


def _on(images: torch.Tensor, samples: torch.Tensor, change: Change) -> torch.Tensor:
    """`images` with `change` applied to some samples."""
    if not len(samples):
        return images
    return images.index_copy(0, samples, change(images.index_select(0, samples)))


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A small array on its way to the device, without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# -- jitter: uint8 (b, 3, H, W) and factors (b,) float64 -> uint8 ---------------------------------------------------


def _brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return images.to(torch.float32).mul_(_column(factors)).clamp_(0, 255).to(torch.uint8)


def _contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    # In float64 this sum of whole numbers is exact, in whatever order a device adds.
    mean = _luma(images).floor().mean(dim=(-3, -2, -1), keepdim=True, dtype=torch.float64)
    return _blend(images, mean.float(), factors)


def _saturation(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return _blend(images, _luma(images).floor(), factors)


def _blend(images: torch.Tensor, other: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """factor * image + (1 - factor) * other."""
    scaled = images.to(torch.float32).mul_(_column(factors))
    return _multiply_add(scaled, other, _column(1.0 - factors)).clamp_(0, 255).to(torch.uint8)


def _luma(images: torch.Tensor) -> torch.Tensor:
    """(b, 3, H, W) -> float32 (b, 1, H, W), ITU-R BT.601 weights."""
    red, green, blue = (images.narrow(-3, channel, 1).to(torch.float32) for channel in range(3))
    return _multiply_add(_multiply_add(red * 0.2989, green, 0.587), blue, 0.114)


def _multiply_add(base: torch.Tensor, other: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """base + factor * other with one rounding to float32, as in a fused multiply-add; a second one would change a pixel
    where the exact result is a whole number, which is everywhere in a grey image."""
    exact = factor.double() if isinstance(factor, torch.Tensor) else float(np.float32(factor))
    return (base.double() + other.double() * exact).float()


def _column(factors: torch.Tensor) -> torch.Tensor:
    return factors.float().view(-1, 1, 1, 1)


def _hue(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Turns the hue in HSV space (Smith, Color gamut transform pairs, SIGGRAPH 1978)."""
    hue, saturation, value = _to_hsv(images.to(torch.float32).mul_(1.0 / 255))
    hue = hue.add_(factors.float().view(-1, 1, 1)).remainder_(1.0)
    return _from_hsv(hue, saturation, value).mul_(255 + 1.0 - 1e-3).to(torch.uint8)


def _to_hsv(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(b, 3, H, W) in [0, 1] -> hue in turns, saturation, value: (b, H, W) each."""
    low, value = torch.aminmax(images, dim=-3)
    spread = value - low
    flat = spread == 0
    saturation = spread / value.masked_fill(flat, 1.0)
    distance = (value.unsqueeze(-3) - images) / spread.masked_fill(flat, 1.0).unsqueeze(-3)
    red, green, blue = distance.unbind(-3)
    sixths = torch.where(images[:, 1] == value, 2.0 + red - blue, 4.0 + green - red)
    sixths = torch.where(images[:, 0] == value, blue - green, sixths)
    return sixths.mul_(1 / 6).add_(1.0).fmod_(1.0), saturation, value


def _from_hsv(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Inverse of _to_hsv.  Over the six sectors of the hue a channel is high, falls, is low twice, rises, is high;
    green runs two sectors behind red, and blue four."""
    sixths = hue * 6
    sector = sixths.floor()
    part = saturation * sixths.sub_(sector)
    low = (1.0 - saturation).mul_(value)
    falling = (1.0 - part).mul_(value)
    rising = (part + (1.0 - saturation)).mul_(value)
    channels = []
    for behind in (0, 2, 4):
        own = (sector - behind).remainder_(6)
        channel = torch.where((own == 2) | (own == 3), low, value)
        channel = torch.where(own == 1, falling, channel)
        channels.append(torch.where(own == 4, rising, channel))
    return torch.stack(channels, dim=-3).clamp_(0.0, 1.0)


JITTER = (_brightness, _contrast, _saturation, _hue)


# -- blur -----------------------------------------------------------------------------------------------------------


def gaussian_taps(sigma: NDArray[np.float64], kernel: int) -> NDArray[np.float64]:
    """Sampled Gaussians that sum to one: (b,) -> (b, kernel)."""
    offset = np.arange(kernel) - kernel // 2
    weights = np.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float64)


def gaussian_blur(images: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """Separable convolution with each sample's own taps (b, k), borders reflected.

    Shifted sums and no convolution call: cuDNN would compute it in TF32 and choose another algorithm every time.
    """
    half = taps.shape[1] // 2
    padded = torch.nn.functional.pad(images, (half, half, half, half), mode="reflect")
    return _slide(_slide(padded, taps, -1), taps, -2)


def _slide(images: torch.Tensor, taps: torch.Tensor, dim: int) -> torch.Tensor:
    weights = taps.float().view(*taps.shape, 1, 1, 1).unbind(1)  # k times (b, 1, 1, 1)
    size = images.shape[dim] - len(weights) + 1
    total = images.narrow(dim, 0, size) * weights[0]
    for k, weight in enumerate(weights[1:], start=1):
        total.addcmul_(images.narrow(dim, k, size), weight)
    return total
