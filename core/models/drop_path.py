"""Stochastic depth by independent draws per sample, at any rate."""

from __future__ import annotations

from typing import Literal

import timm.layers.drop
from torch import nn

from core.models.vit import DropPath


class SampleDropPath(DropPath):
    """Each sample's branch is kept with probability 1 - rate and divided by it, whatever the rate."""

    @property
    def rule(self) -> Literal["none", "mask", "subset"]:
        return "mask" if self.rate > 0 else "none"


def remove_drop_path(model: nn.Module) -> None:
    """Set the rate of timm's modules to 0: some networks have stochastic depth where nothing is said of it."""
    for module in model.modules():
        if isinstance(module, timm.layers.drop.DropPath):
            module.drop_prob = 0.0


def use_sample_drop_path(model: nn.Module) -> None:
    """Put `SampleDropPath` in the place of timm's modules, and of UNIC's rules, of the same rates."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, timm.layers.drop.DropPath):
                setattr(parent, name, SampleDropPath(child.drop_prob))
            elif isinstance(child, DropPath):
                setattr(parent, name, SampleDropPath(child.rate))
