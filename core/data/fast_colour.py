"""The colour chain of core.data.colour in float32 arithmetic on grey levels: the same draws, several times as fast.

Every operation still ends on whole grey levels, as on uint8 images, so results differ by a level or two, and only where
a sum is rounded otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data.box_blur import box_filter, box_taps
from core.data.colour import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SOLARISE_THRESHOLD,
    Colour,
    gaussian_blur,
    gaussian_taps,
    to_device,
)

TOP = 255.0
LUMA = (0.2989, 0.587, 0.114)
Change = Callable[[Tensor, Tensor], Tensor]


def fast_colour(images: Tensor, colour: Colour) -> Tensor:
    """Jitter, grey, blur, solarise and normalise: uint8 or whole float levels (B, 3, H, W) -> float32, normalised."""
    return _normalised(_blurred(_jittered(images.to(torch.float32, copy=True), colour), colour))


def _jittered(levels: Tensor, colour: Colour) -> Tensor:
    """Jitter in each sample's own order, then grey; in place."""
    picks = [np.flatnonzero(colour.jit & (column == op)) for column in colour.order.T for op in range(len(JITTER))]
    *jitter, gray = _on_device([*picks, np.flatnonzero(colour.gray)], levels.device)
    factors = to_device(np.nan_to_num(colour.factors).astype(np.float32), levels.device)
    for k, samples in enumerate(jitter):
        op = k % len(JITTER)
        if len(samples):
            chosen = factors[:, op].index_select(0, samples).view(-1, 1, 1, 1)
            levels.index_copy_(0, samples, JITTER[op](levels.index_select(0, samples), chosen))
    if len(gray):
        grey = _luma(levels.index_select(0, gray), 0.5 if colour.box_passes else 0.0)
        levels.index_copy_(0, gray, grey.expand(-1, 3, -1, -1))
    return levels


def _blurred(levels: Tensor, colour: Colour) -> Tensor:
    """Blur, then solarise; in place."""
    blurred = np.flatnonzero(~np.isnan(colour.sigma))
    blur, solarise = _on_device([blurred, np.flatnonzero(colour.solarise)], levels.device)
    if len(blur):
        sharp, sigma, passes = levels.index_select(0, blur), colour.sigma[blurred], colour.box_passes
        taps = to_device(box_taps(sigma, passes) if passes else gaussian_taps(sigma, colour.kernel), levels.device)
        levels.index_copy_(0, blur, box_filter(sharp, taps, passes) if passes else gaussian_blur(sharp, taps))
    if len(solarise):
        x = levels.index_select(0, solarise)
        levels.index_copy_(0, solarise, torch.where(x >= SOLARISE_THRESHOLD * TOP, TOP - x, x))
    return levels


def _normalised(levels: Tensor) -> Tensor:
    for channel, mean, std in zip(levels.unbind(-3), IMAGENET_MEAN, IMAGENET_STD, strict=True):
        channel.mul_(1 / (TOP * std)).sub_(mean / std)
    return levels


def _on_device(picks: list[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """Lists of samples on the device, by one copy."""
    edges = np.cumsum([len(samples) for samples in picks])[:-1].tolist()
    return list(to_device(np.concatenate(picks), device).tensor_split(edges))


# -- jitter: levels (b, 3, H, W), not kept, and factors (b, 1, 1, 1) -> levels --------------------------------------


def _brightness(x: Tensor, factors: Tensor) -> Tensor:
    return x.mul_(factors).clamp_(max=TOP).floor_()


def _contrast(x: Tensor, factors: Tensor) -> Tensor:
    return _blend(x, _luma(x).mean(dim=(-3, -2, -1), keepdim=True), factors)


def _saturation(x: Tensor, factors: Tensor) -> Tensor:
    return _blend(x, _luma(x), factors)


def _blend(x: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    return x.mul_(factors).add_(other * (1 - factors)).clamp_(0, TOP).floor_()


def _luma(x: Tensor, rounding: float = 0.0) -> Tensor:
    red, green, blue = (x.narrow(-3, channel, 1) for channel in range(3))
    luma = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])
    # Weights sum to one and levels are whole: without the margin, a grey image would lose a level.
    return luma.add_(rounding or 1e-4).floor_()


def _hue(x: Tensor, factors: Tensor) -> Tensor:
    """Turns the hue: a turn keeps the largest and the smallest channel, and moves each along a trapezium in between."""
    low, value = torch.aminmax(x, dim=-3)
    spread = value - low
    red, green, blue = x.unbind(-3)
    slope = spread.clamp(min=1.0).reciprocal_()
    of_blue = (red - green).mul_(slope).add_(4.0)
    of_green = (blue - red).mul_(slope).add_(2.0)
    sixths = torch.where(red == value, (green - blue).mul_(slope), torch.where(green == value, of_green, of_blue))
    sixths.add_(factors.squeeze(1), alpha=6.0)
    for channel, ahead in zip((red, green, blue), (5.0, 3.0, 1.0), strict=True):
        place = (sixths + ahead).remainder_(6.0)
        fall = torch.minimum(place, 4.0 - place).clamp_(0.0, 1.0)
        torch.addcmul(value, spread, fall, value=-1.0, out=channel)
    return x.mul_((TOP + 1.0 - 1e-3) / TOP).clamp_(max=TOP).floor_()


JITTER: tuple[Change, ...] = (_brightness, _contrast, _saturation, _hue)
