"""timm's RandAugment on a whole batch: timm draws what is done to each sample, the pixels are done here, on any device.

Formulas are Pillow's, on whole grey levels; they differ from it by a level where a sum is rounded otherwise.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from core.data.colour import IMAGENET_MEAN, to_device
from core.data.rand_augment import lent_generators, policy_of
from core.data.source import DataError

NUMBERS = 2  # that an operation takes at most
FILL = tuple(float(round(255 * mean)) for mean in IMAGENET_MEAN)
TOP, MIDDLE = 255.0, 128.0
MARGIN = 1e-3  # else a sum that should be whole could lose a level by rounding
LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # Pillow's


@cache
def _recorder(policy: str, size: int) -> Any:
    """timm's policy, with operations that only note down what they are asked for."""
    recorder = copy.deepcopy(policy_of(policy, size))
    for operation in recorder.ops:
        name = operation.aug_fn.__name__
        if name not in NAMES:
            raise DataError(f"{name} of the policy {policy} has no fast form; set data.pixels=exact")
        operation.aug_fn = partial(_note, name)
    return recorder


def _note(name: str, steps: list[list[float]], *numbers: float, **_: Any) -> list[list[float]]:
    return [*steps, [NAMES.index(name), *(float(n) for n in numbers), *[0.0] * (NUMBERS - len(numbers))]]


def draw_steps(policy: str, size: int, seed: int, epoch: int, samples: NDArray[np.int64], view: int) -> Tensor:
    """What RandAugment does to samples (B,): (B, L, 1 + NUMBERS) float64, the number of an operation and its own
    numbers, in order; -1 is nothing.  The draws are those of `rand_augment`.  Raises DataError for an operation that
    is not known here."""
    recorder = _recorder(policy, size)
    steps = np.full((len(samples), recorder.num_layers, 1 + NUMBERS), -1.0)
    with lent_generators() as belong_to:
        for row, sample in enumerate(samples.tolist()):
            belong_to((seed, epoch, sample, view))
            for turn, step in enumerate(recorder([])):
                steps[row, turn] = step
    return torch.from_numpy(steps)


def fast_rand_augment(images: Tensor, steps: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) on any device, steps on the CPU -> float32 (B, 3, S, S), whole grey levels."""
    levels = images.to(torch.float32, copy=True)
    plan = steps.numpy()
    for turn in range(plan.shape[1]):
        for number, change in enumerate(OPERATIONS.values()):
            rows = np.flatnonzero(plan[:, turn, 0] == number)
            if len(rows):
                where, own = to_device(rows, levels.device), to_device(plan[rows, turn, 1:], levels.device)
                levels.index_copy_(0, where, change(levels.index_select(0, where), own))
    return levels


# -- operations: levels (b, 3, S, S), not kept, and numbers (b, NUMBERS) float64 -> levels ---------------------------


def _column(numbers: Tensor, which: int = 0) -> Tensor:
    return numbers[:, which].float().view(-1, 1, 1, 1)


def _invert(x: Tensor, numbers: Tensor) -> Tensor:
    return TOP - x


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = torch.exp2(8 - _column(bits).clamp(max=8))
    return x.div_(step).floor_().mul_(step)


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x < _column(threshold), x, TOP - x)


def _solarize_add(x: Tensor, added: Tensor) -> Tensor:
    return torch.where(x < MIDDLE, (x + _column(added)).clamp_(max=TOP), x)


def _autocontrast(x: Tensor, numbers: Tensor) -> Tensor:
    low, high = x.amin((-1, -2), keepdim=True), x.amax((-1, -2), keepdim=True)
    flat = high <= low
    stretched = x.sub_(low).mul_(TOP / (high - low).masked_fill_(flat, TOP)).add_(MARGIN).floor_()
    return stretched.add_(low.masked_fill_(~flat, 0.0))


def _equalize(x: Tensor, numbers: Tensor) -> Tensor:
    """Cumulative histogram of each channel, in steps of 1/255 of its pixels but the brightest ones."""
    index = x.flatten(-2).long()  # (b, 3, S S)
    counts = torch.zeros(*index.shape[:2], 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(-1, index, torch.ones((), dtype=torch.int64, device=x.device).expand_as(index))
    brightest = x.amax((-1, -2)).long().unsqueeze(-1)
    step = (index.shape[-1] - counts.gather(-1, brightest)) // 255
    table = (step // 2 + counts.cumsum(-1) - counts) // step.clamp(min=1)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device)).clamp_(max=255)
    return table.float().gather(-1, index).view_as(x)


def _blend(x: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    f = _column(factors)
    return x.mul_(f).add_(other * (1 - f)).clamp_(0, TOP).floor_()


def _luma(x: Tensor) -> Tensor:
    red, green, blue = (x.narrow(-3, channel, 1) for channel in range(3))
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).add_(0.5).floor_()


def _color(x: Tensor, factors: Tensor) -> Tensor:
    return _blend(x, _luma(x), factors)


def _contrast(x: Tensor, factors: Tensor) -> Tensor:
    return _blend(x, _luma(x).mean((-3, -2, -1), keepdim=True).add_(0.5).floor_(), factors)


def _brightness(x: Tensor, factors: Tensor) -> Tensor:
    return _blend(x, torch.zeros((), device=x.device), factors)


def _sharpness(x: Tensor, factors: Tensor) -> Tensor:
    smooth, inner = x.clone(), x[..., 1:-1, 1:-1]
    rows = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner
    smooth[..., 1:-1, 1:-1] = total.div_(13).add_(0.5).floor_()
    return _blend(x, smooth, factors)


# -- geometry: Pillow's bicubic, pixels from outside filled ----------------------------------------------------------


def _taps(part: Tensor) -> list[Tensor]:
    """Cubic weights (Keys, a = -1) of the four pixels around a place, at the share `part` behind the second one."""
    d = part
    return [-d * (1 - d) ** 2, 1 - 2 * d**2 + d**3, d * (1 + d - d**2), -(d**2) * (1 - d)]


def _fill(x: Tensor, inside: Tensor) -> Tensor:
    for channel, value in zip(x.unbind(-3), FILL, strict=True):
        channel.masked_fill_(~inside, value)
    return x.clamp_(0, TOP).floor_()


def _along_rows(x: Tensor, shift: Tensor) -> Tensor:
    """Pixel (r, c) comes from column c + shift[r].  shift: (b, S) float64."""
    side = x.shape[-1]
    low = shift.floor()  # (b, S): pixels are that far, and a share of the next one, apart
    weights = [weight[:, None, :, None] for weight in _taps((shift - low).float())]
    columns = torch.arange(side, device=x.device)
    first = (columns + low.long().unsqueeze(-1)).clamp_(-1, side - 1).add_(1)  # in a line with two more before
    padded, index = pad(x, (2, 2, 0, 0), mode="replicate"), first.unsqueeze(1).expand_as(x)
    total = torch.zeros_like(x)
    for k, weight in enumerate(weights):
        total.addcmul_(padded.narrow(-1, k, side + 1).gather(-1, index), weight)
    place = columns + 0.5 + shift.unsqueeze(-1)
    return _fill(total, (place >= 0) & (place < side))


def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    side = x.shape[-1]
    angle = -degrees[:, :1, None] * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    centred = torch.arange(side, device=x.device, dtype=torch.float64) + 0.5 - side / 2
    across, down = centred.view(1, 1, -1), centred.view(1, -1, 1)
    in_columns, left, across_part = _below((cos * across + side / 2) + sin * down, side)
    in_rows, top, down_part = _below((cos * down + side / 2) - sin * across, side)
    wide = side + 4
    flat = pad(x, (2, 2, 2, 2), mode="replicate").flatten(-2)
    index = (top * wide + left).flatten(1).unsqueeze(1).expand(-1, 3, -1)
    across_taps, total = _taps(across_part), torch.zeros_like(x)
    for j, down_weight in enumerate(_taps(down_part)):
        for k, weight in enumerate(across_taps):
            pixels = flat.narrow(-1, j * wide + k, flat.shape[-1] - 3 * wide - 3).gather(-1, index)
            total.addcmul_(pixels.view_as(x), (weight * down_weight).unsqueeze(1))
    return _fill(total, in_columns & in_rows)


def _below(place: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places on a line of pixels: whether inside, the first of four pixels around in a line with two more before, and
    how far behind the second one."""
    inside, place = (place >= 0) & (place < side), (place - 0.5).float()
    low = place.floor()
    return inside, low.clamp(-1, side - 1).long().add_(1), place.sub_(low)


def _sheared(x: Tensor, factors: Tensor) -> Tensor:
    side = x.shape[-1]
    return _along_rows(x, factors[:, :1] * (torch.arange(side, device=x.device) + 0.5))


def _shifted(x: Tensor, share: Tensor) -> Tensor:
    side = x.shape[-1]
    return _along_rows(x, (share[:, :1] * side).expand(-1, side))


def _turned(change: Callable[[Tensor, Tensor], Tensor], x: Tensor, numbers: Tensor) -> Tensor:
    """The same along columns."""
    return change(x.transpose(-1, -2).contiguous(), numbers).transpose(-1, -2)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": _autocontrast, "equalize": _equalize, "invert": _invert, "rotate": _rotate,
    "posterize": _posterize, "solarize": _solarize, "solarize_add": _solarize_add, "color": _color,
    "contrast": _contrast, "brightness": _brightness, "sharpness": _sharpness, "shear_x": _sheared,
    "shear_y": partial(_turned, _sheared), "translate_x_rel": _shifted, "translate_y_rel": partial(_turned, _shifted),
}  # fmt: skip
NAMES = list(OPERATIONS)
