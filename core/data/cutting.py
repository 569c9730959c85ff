"""What a worker makes of decoded images, in the two ways of `data.pixels`; core.data.rendering does the rest.

exact: all that has to do with geometry in the worker, pixel for pixel as the methods' releases do it; colours on the
device, in torchvision's own rounding.
fast: RandAugment is drawn in the worker and done on the device, colours are float arithmetic, photographs much larger
than their views are decoded smaller, and of crops and whole image what is smaller goes to the device: a single crop is
cut out by the worker; several ones, which repeat the pixels of their image, on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data.fast_rand_augment import draw_steps
from core.data.packed import Packed, pack, shippable
from core.data.rand_augment import rand_augment
from core.data.views import Cropped, Crops, View, random_resized_crop, shorten

BOX = "box/"  # in `Cut.extra`, by view: (B, 5) int32 top, left, height, width, mirrored
LONG = 2  # images of up to this, squared, as width / height keep their short side
Ints = NDArray[np.int64]


def enough_pixels(views: Sequence[View], fast: bool) -> int:
    """Of a whole image, below which the smallest crop of a view would be enlarged more than it has to be; 0: all."""
    sides = [LONG * view.resize or view.size / view.scale[0] ** 0.5 for view in views]
    return round(max(sides) ** 2) if fast else 0


def check_policies(views: Sequence[View]) -> None:
    """Raises DataError for a RandAugment that has no fast form."""
    for view in views:
        if view.rand_augment:
            draw_steps(view.rand_augment, view.size, 0, 0, np.arange(0), 0)


@dataclass
class Cut:
    """A micro-batch's pixels on their way to the device.

    views: View.name -> uint8 (B, 3, size, size).  packed: whole images instead.  steps: View.name -> what RandAugment
    is still to do, (B, L, 3).  extra: what else the method's crops tell.
    """

    views: dict[str, Tensor] = field(default_factory=dict)
    packed: Packed | None = None
    steps: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)


class Cutter:
    """Fills a `Cut` for B samples, some images at a time: a decoded image is held until it is cut or packed."""

    def __init__(self, views: Sequence[View], crops: Crops, seed: int, epoch: int, samples: int, fast: bool) -> None:
        self.all_views, self.crops, self.key, self.count, self.fast = views, crops, (seed, epoch), samples, fast
        self.whole = fast and len(views) > 1
        self.images: list[Tensor] = []  # to be packed
        self.samples = np.zeros(0, np.int64)
        self.cut = Cut()

    def add(self, images: list[Tensor], samples: Ints) -> None:
        """Decoded images (3, H, W) of the next samples (b,)."""
        images = [shorten(image, self.all_views[0].resize) for image in images]
        rows = slice(len(self.samples), len(self.samples) + len(images))
        self.samples = np.concatenate([self.samples, samples])
        if self.whole:
            self.images += images
            return
        cropped = self._cropped(images, samples)
        for name, array in cropped.extra.items():
            if not rows.start:
                self.cut.extra[name] = torch.from_numpy(array).new_empty(self.count, *array.shape[1:])
            self.cut.extra[name][rows] = torch.from_numpy(array)
        for number, view in enumerate(self.all_views):
            if not rows.start:
                self.cut.views[view.name] = shippable(self.count, 3, view.size, view.size)
            self._crop(self.cut.views[view.name][rows], images, cropped, samples, number)

    def finish(self) -> Cut:
        """Once all samples have been added."""
        if self.whole:  # boxes for all at once: for UDI's, a sixth of the time that eight at once take
            cropped = self._cropped(self.images, self.samples)
            self.cut.packed = pack(self.images, cropped)
            self.cut.extra = {name: torch.from_numpy(array) for name, array in cropped.extra.items()}
        for number, view in enumerate(self.all_views):
            if self.fast and view.rand_augment:
                steps = draw_steps(view.rand_augment, view.size, *self.key, self.samples, number)
                self.cut.steps[view.name] = steps
        return self.cut

    def _cropped(self, images: list[Tensor], samples: Ints) -> Cropped:
        found = self.crops(*self.key, samples, np.array([image.shape[1:] for image in images]))
        places = {f"{BOX}{name}": np.column_stack([boxes, found.flips[name]]) for name, boxes in found.boxes.items()}
        return replace(found, extra=found.extra | {name: array.astype(np.int32) for name, array in places.items()})

    def _crop(self, out: Tensor, images: list[Tensor], cropped: Cropped, samples: Ints, number: int) -> None:
        """Fill `out` (b, 3, size, size) with one view of each image."""
        view = self.all_views[number]
        boxes, flips = cropped.boxes[view.name], cropped.flips[view.name]
        for row, image in enumerate(images):
            crop = random_resized_crop(image, boxes[row], bool(flips[row]), view.size, view.interpolation)
            if view.rand_augment and not self.fast:
                crop = rand_augment(crop, view.rand_augment, (*self.key, int(samples[row]), number))
            out[row] = crop
