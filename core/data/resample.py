"""Crop and antialiased resize of a batch by two matrix products: how a GPU cuts views out of whole images."""

from __future__ import annotations

import torch
from torch import Tensor

BICUBIC = -0.5  # a of Keys' kernel, as in Pillow's resize
TOP = 255.0


def resample(images: Tensor, boxes: Tensor, size: int, interpolation: str) -> Tensor:
    """Grey levels (B, 3, H, W) of a float type -> (B, 3, size, size), whole levels of the same type.

    boxes: (B, 5) int64 top, left, height, width and whether mirrored, on the images' device.  As torchvision does it
    on uint8: along rows first, rounded in between, and nothing from outside the box is seen.
    """
    top, left, height, width, flip = boxes.to(torch.float32).unbind(1)
    down = weights(top, height, torch.zeros_like(flip), size, images.shape[-2], interpolation).to(images.dtype)
    across = weights(left, width, flip, size, images.shape[-1], interpolation).to(images.dtype)
    rows = torch.matmul(images, across.transpose(1, 2).unsqueeze(1)).round_().clamp_(0, TOP)
    return torch.matmul(down.unsqueeze(1), rows).round_().clamp_(0, TOP)


def weights(start: Tensor, extent: Tensor, flip: Tensor, size: int, length: int, interpolation: str) -> Tensor:
    """(B, size, length): how much each of `length` pixels counts in each of `size`; rows sum to one.

    start, extent: (B,) the part that is resized.  flip: (B,) 1 where it is mirrored.
    """
    out = torch.arange(size, device=start.device, dtype=torch.float32)
    out = torch.where(flip[:, None] > 0, size - 1 - out, out)  # (B, size)
    scale = (extent / size).unsqueeze(1)
    centre = (start.unsqueeze(1) + (out + 0.5) * scale).unsqueeze(2)
    place = torch.arange(length, device=start.device, dtype=torch.float32) + 0.5
    reach = scale.clamp(min=1.0).unsqueeze(2)
    distance = ((place - centre) / reach).abs_()
    inside = (place > start[:, None, None]) & (place < (start + extent)[:, None, None])
    kernel = _cubic(distance) if interpolation == "bicubic" else (1.0 - distance).clamp_(min=0.0)
    kernel = kernel.masked_fill_(~inside, 0.0)
    return kernel.div_(kernel.sum(-1, keepdim=True))


def _cubic(d: Tensor) -> Tensor:
    a = BICUBIC
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = (((d - 5) * d + 8) * d - 4) * a
    return torch.where(d < 1, near, torch.where(d < 2.0, far, 0.0))
