"""UPerNet, the neck and head that segment images from ViT features (Xiao et al., arXiv 1807.10221); mmsegmentation's
names.

Proteus, section 9.3 of its notes: maps of four blocks at four scales, pyramid pooling of the coarsest, no aligned
corners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.evaluate.dpt import ConvBlock

POOL_SCALES = (1, 2, 3, 6)


def resized(x: Tensor, like: Tensor) -> Tensor:
    """A map at the resolution of another one."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


class ScaleNeck(nn.Module):
    """Four maps (B, D, h, w) of one grid -> the same at 4, 2, 1 and 1/2 times its resolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.upsample_4x = nn.Sequential(
            nn.ConvTranspose2d(dim, dim, 2, 2), nn.BatchNorm2d(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)
        )
        self.upsample_2x = nn.Sequential(nn.ConvTranspose2d(dim, dim, 2, 2))
        self.downsample_2x = nn.MaxPool2d(2, 2)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        finest, finer, same, coarser = maps
        return [self.upsample_4x(finest), self.upsample_2x(finer), same, self.downsample_2x(coarser)]


class UperHead(nn.Module):
    """Maps from fine to coarse (B, D_i, h_i, w_i) -> scores of every class (B, classes, h_0, w_0).

    Args:
        dims: channels of each map.
        width: channels within the head.
        pool_scales: cells a side to which the coarsest map is averaged.
        dropout: share of channels left out before the scores, in training.
    """

    def __init__(
        self, dims: Sequence[int], width: int, classes: int, pool_scales: Sequence[int] = POOL_SCALES,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        *finer, coarsest = dims
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _conv(coarsest, width, 1)) for scale in pool_scales
        )
        self.bottleneck = _conv(coarsest + len(pool_scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(_conv(dim, width, 1) for dim in finer)
        self.fpn_convs = nn.ModuleList(_conv(width, width, 3) for _ in finer)
        self.fpn_bottleneck = _conv(len(dims) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self._pooled(maps[-1])
        levels = [x]
        for lateral, fpn, finer in zip(self.lateral_convs[::-1], self.fpn_convs[::-1], maps[-2::-1], strict=True):
            own = lateral(finer)
            x = own + resized(x, own)
            levels.insert(0, fpn(x))
        together = torch.cat([resized(level, levels[0]) for level in levels], dim=1)
        return cast(Tensor, self.conv_seg(self.dropout(self.fpn_bottleneck(together))))

    def _pooled(self, x: Tensor) -> Tensor:
        """The coarsest map beside its averages over ever smaller cells."""
        return cast(Tensor, self.bottleneck(torch.cat([x, *(resized(pool(x), x) for pool in self.psp_modules)], dim=1)))


def _conv(inside: int, out: int, kernel: int) -> ConvBlock:
    return ConvBlock(inside, out, kernel, norm=True, relu=True)
