"""From what workers ship to what networks see: the part of augmentation that runs in batch on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.data.colour import apply_colour
from core.data.fast_colour import fast_colour
from core.data.fast_rand_augment import fast_rand_augment
from core.data.packed import cut_views
from core.data.rand_augment import erase
from core.data.samples import MicroBatch
from core.data.views import View, draw_colour


def rendered(
    micro: MicroBatch, views: Sequence[View], device: torch.device, seed: int, fast: bool
) -> dict[str, Tensor]:
    """View.name -> (B, 3, size, size) float32, normalised.  Waits for nothing.

    fast: as the micro-batch was made, see core.data.cutting.
    """
    samples, images = micro.index.numpy(), {}
    cut = {name: view.to(device, non_blocking=True) for name, view in micro.views.items()}
    if micro.packed is not None:
        cut = cut_views(micro.packed.to(device), views)
    for number, view in enumerate(views):
        x, colour = cut.pop(view.name), draw_colour(view, seed, micro.drawn, samples, number)
        if view.name in micro.steps:
            x = fast_rand_augment(x, micro.steps[view.name])
        x = fast_colour(x, colour) if fast else apply_colour(x, colour)
        images[view.name] = erase(x, view.erase, seed, micro.drawn, samples) if view.erase else x
    return images
