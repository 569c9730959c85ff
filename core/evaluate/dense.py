"""Dense prediction over large images: sliding windows, learning rates by depth, and groups by name.

The protocols of Proteus, sections 9.3 and 9.4 of its notes, which are those of mmsegmentation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]  # (B, 3, h, w) -> (B, C, h, w)


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` begin on an axis; the last one is moved back so that it ends with the axis."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]


def slide(network: Network, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """Predictions (B, C, H, W) of overlapping windows, averaged where these overlap: images (B, 3, H, W).

    Windows are cut down to images smaller than `crop`, both (height, width).
    """
    height, width = images.shape[-2:]
    total, seen = None, images.new_zeros(1, 1, height, width)
    for top in window_starts(height, crop[0], stride[0]):
        for left in window_starts(width, crop[1], stride[1]):
            here = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            out = network(images[here])
            total = out.new_zeros(len(images), out.shape[1], height, width) if total is None else total
            total[here] += out
            seen[here] += 1
    assert total is not None
    return total / seen


def slide_flip(network: Network, images: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """`slide` with every window's prediction averaged with that of its mirror image: (B, 3, H, W) -> (B, C, H, W)."""
    return slide(lambda window: (network(window) + network(window.flip(-1)).flip(-1)) / 2, images, crop, stride)


def layer_of(name: str, depth: int) -> int:
    """0 for the embeddings of the backbone, i + 1 for its block i, depth + 1 for everything behind it."""
    if re.match(r"backbone\.(cls_token|mask_token|pos_embed|patch_embed\b)", name):
        return 0
    block = re.match(r"backbone\.(?:layers|blocks)\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def layer_decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], depth: int, rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameters by layer: lr_scale = rate^(depth + 1 - layer); vectors and biases are not decayed.

    Position tables, tokens and relative tables are decayed.  Returns groups {params, names, weight_decay, lr_scale}.
    """
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        layer, free = layer_of(name, depth), parameter.ndim == 1 or name.endswith(".bias")
        own = {"params": [], "names": [], "weight_decay": 0.0 if free else weight_decay}
        group = groups.setdefault((layer, free), {**own, "lr_scale": rate ** (depth + 1 - layer)})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def multiplier_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    rules: Mapping[str, tuple[float, float]],
) -> list[dict[str, Any]]:
    """Parameters by (lr, weight decay) factors: of the rules whose key is part of the name the longest wins.

    rules: part of a name -> factors of the learning rate and of the weight decay; (1, 1) where none fits.
    Returns groups {params, names, weight_decay, lr_scale}.
    """
    ordered = sorted(sorted(rules), key=len, reverse=True)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named_parameters:
        lr, decay = next((rules[key] for key in ordered if key in name), (1.0, 1.0))
        own = {"params": [], "names": [], "weight_decay": weight_decay * decay, "lr_scale": lr}
        group = groups.setdefault((lr, decay), own)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())
