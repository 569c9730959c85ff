"""Whole images of a micro-batch in one piece, and views cut out of them on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from core.data.colour import to_device
from core.data.resample import resample
from core.data.views import Cropped, View, random_resized_crop

CANVAS_BYTES = 1 << 29  # of the images that a GPU cuts views out of at once
Ints = NDArray[np.int64]


@dataclass
class Packed:
    """B images, and where each view is cut out of them.

    pixels: uint8, the images one after another, each (H, W, 3).  sizes: int64 (B, 2), H and W.
    boxes: View.name -> (B, 5) int64: top, left, height, width and whether mirrored.
    """

    pixels: Tensor
    sizes: Tensor
    boxes: dict[str, Tensor]

    def pin_memory(self) -> Packed:
        return Packed(self.pixels.pin_memory(), self.sizes, self.boxes)

    def to(self, device: torch.device) -> Packed:
        """With the pixels on their way to the device; where they lie stays known to the CPU."""
        return Packed(self.pixels.to(device, non_blocking=True), self.sizes, self.boxes)

    def images(self) -> list[Tensor]:
        """(3, H, W) each, without a copy."""
        sizes = self.sizes.tolist()
        starts = np.cumsum([0, *(3 * height * width for height, width in sizes)]).tolist()
        parts = zip(starts, starts[1:], sizes, strict=False)
        return [self.pixels[start:end].view(*size, 3).permute(2, 0, 1) for start, end, size in parts]


def shippable(*shape: int) -> Tensor:
    """uint8 to be filled; in a loader's worker in memory that the process that gets it can see, which saves a copy."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]  # as torch's collate
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)


def pack(images: Sequence[Tensor], cropped: Cropped) -> Packed:
    """Images (3, H, W) and where their views are cut out."""
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64)
    pixels = shippable(sum(image.numel() for image in images))
    starts = np.cumsum([0, *(image.numel() for image in images)]).tolist()
    for image, start in zip(images, starts, strict=False):
        pixels[start : start + image.numel()] = image.permute(1, 2, 0).reshape(-1)
    boxes = {
        name: torch.from_numpy(np.column_stack([found, cropped.flips[name]]).astype(np.int64))
        for name, found in cropped.boxes.items()
    }
    return Packed(pixels, sizes, boxes)


def cut_views(packed: Packed, views: Sequence[View]) -> dict[str, Tensor]:
    """Every view of packed images that lie on a device: View.name -> (B, 3, size, size), whole grey levels.

    On a CPU image by image, with the pixels that a worker would have cut (uint8); on a GPU all images of a canvas at
    once (float16), within two levels of that.
    """
    images = packed.images()
    if packed.pixels.device.type == "cpu":
        return {view.name: _cut(images, packed.boxes[view.name], view) for view in views}
    parts = [_on_canvas(packed, images, rows, views) for rows in _canvases(packed.sizes.numpy())]
    return {view.name: torch.cat([part[view.name] for part in parts]) for view in views}


def _cut(images: Sequence[Tensor], boxes: Tensor, view: View) -> Tensor:
    out = torch.empty(len(images), 3, view.size, view.size, dtype=torch.uint8)
    for row, (image, (*box, flip)) in enumerate(zip(images, boxes.tolist(), strict=True)):
        out[row] = random_resized_crop(image, np.array(box), bool(flip), view.size, view.interpolation)
    return out


def _on_canvas(packed: Packed, images: Sequence[Tensor], rows: slice, views: Sequence[View]) -> dict[str, Tensor]:
    """Views of the images of some rows, by matrix products."""
    own, device = images[rows], packed.pixels.device
    height, width = packed.sizes[rows].amax(0).tolist()
    canvas = torch.zeros(len(own), 3, height, width, dtype=torch.float16, device=device)
    for place, image in zip(canvas, own, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return {
        view.name: resample(
            canvas, to_device(packed.boxes[view.name][rows].numpy(), device), view.size, view.interpolation
        )
        for view in views
    }


def _canvases(sizes: Ints) -> Iterator[slice]:
    """Rows that share a canvas as large as the largest of them, of at most CANVAS_BYTES where there are several."""
    first = 0
    for last in range(1, len(sizes) + 1):
        if last == len(sizes) or 6 * (last + 1 - first) * sizes[first : last + 1].max(0).prod() > CANVAS_BYTES:
            yield slice(first, last)
            first = last
