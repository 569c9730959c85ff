"""From what the loader ships to what networks see: pixels and draws of a micro-batch, on its device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from core.data.rendering import rendered
from core.data.samples import MicroBatch
from core.data.views import normalize
from core.methods.base import Batch, Method
from core.recipe import Recipe


def on_device(micro: MicroBatch, method: Method, recipe: Recipe, device: torch.device) -> Batch:
    """A training batch on the device, with the rest of each view's augmentation and the method's own draws applied."""
    images = rendered(micro, method.views(), device, recipe.seed, recipe.data.pixels == "fast")
    labels = micro.labels.to(device, non_blocking=True)
    extra = {name: tensor.to(device, non_blocking=True) for name, tensor in micro.extra.items()}
    batch = Batch(images, micro.index, recipe.seed, micro.epoch, micro.micro, labels=labels, extra=extra)
    return method.prepare(batch)


def clean_batch(
    images: Tensor, labels: Tensor, index: Tensor, method: Method, seed: int, device: torch.device,
    extra: dict[str, Tensor] | None = None,
) -> Batch:  # fmt: skip
    """Images as evaluation has them, uint8 (B, 3, S, S), on the device: nothing is drawn but what `prepare` must."""
    x = normalize(images.to(device))
    views = {view.name: resized(x, view.size) for view in method.views()}
    batch = Batch(views, index, seed, training=False, labels=labels.to(device), extra=extra or {})
    return method.prepare(batch)


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, S, S) at the size of a view that is smaller than the stage's."""
    return images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="bicubic", antialias=True)
