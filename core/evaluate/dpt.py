"""DPT, the head that makes a dense map of ViT features (Ranftl et al., arXiv 2103.13413); mmsegmentation's names.

Proteus, section 9.4 of its notes: class token read out by projection, one output map, no activation behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.evaluate.dense_backbone import Maps


class ConvBlock(nn.Module):
    """Convolution, batch norm and ReLU; with `first` the ReLU comes before the convolution."""

    def __init__(
        self, inside: int, out: int, kernel: int, *, norm: bool = False, relu: bool = False, first: bool = False,
        bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.relu, self.first = relu, first
        self.conv = nn.Conv2d(inside, out, kernel, padding=kernel // 2, bias=bias)
        self.bn = nn.BatchNorm2d(out) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(x) if self.relu and self.first else x)
        x = x if self.bn is None else self.bn(x)
        return F.relu(x) if self.relu and not self.first else x


class ResidualUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvBlock(width, width, 3, norm=True, relu=True, first=True)
        self.conv2 = ConvBlock(width, width, 3, norm=True, relu=True, first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.conv2(self.conv1(x)))


class Fusion(nn.Module):
    """Adds a finer map to the coarse one and doubles the resolution."""

    def __init__(self, width: int, first: bool) -> None:
        super().__init__()
        self.project = ConvBlock(width, width, 1, bias=True)
        self.res_conv_unit1 = None if first else ResidualUnit(width)
        self.res_conv_unit2 = ResidualUnit(width)

    def forward(self, x: Tensor, finer: Tensor | None = None) -> Tensor:
        if finer is not None and self.res_conv_unit1 is not None:
            if finer.shape != x.shape:
                finer = F.interpolate(finer, x.shape[-2:], mode="bilinear", align_corners=False)
            x = x + self.res_conv_unit1(finer)
        x = F.interpolate(self.res_conv_unit2(x), scale_factor=2, mode="bilinear", align_corners=True)
        return cast(Tensor, self.project(x))


class Reassemble(nn.Module):
    """Feature maps of four blocks, one grid -> maps of `widths` channels at 4, 2, 1 and 1/2 times its resolution."""

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        a, b, _, d = widths
        self.projects = nn.ModuleList(ConvBlock(dim, width, 1, bias=True) for width in widths)
        self.resize_layers = nn.ModuleList([
            nn.ConvTranspose2d(a, a, 4, 4), nn.ConvTranspose2d(b, b, 2, 2), nn.Identity(), nn.Conv2d(d, d, 3, 2, 1)
        ])  # fmt: skip
        self.readout_projects = nn.ModuleList(nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU()) for _ in widths)

    def forward(self, features: Sequence[Maps]) -> list[Tensor]:
        out = []
        parts = zip(features, self.readout_projects, self.projects, self.resize_layers, strict=True)
        for (patch, cls), readout, project, resize in parts:
            tokens = patch.flatten(2).mT  # (B, N, D)
            read = readout(torch.cat([tokens, cls.unsqueeze(1).expand_as(tokens)], -1))
            out.append(resize(project(read.mT.unflatten(2, patch.shape[-2:]))))
        return out


class DptHead(nn.Module):
    """Four `Maps` of a grid (h, w) -> (B, out, 16 ceil(h / 2), 16 ceil(w / 2)).

    Args:
        dim: channels of the features.
        widths: channels after reassembly, one for each of the four.
        width: channels of the fusion.
        out: maps to predict, 1 for depth.
    """

    def __init__(self, dim: int, widths: Sequence[int], width: int = 256, out: int = 1) -> None:
        super().__init__()
        self.reassemble_blocks = Reassemble(dim, widths)
        self.convs = nn.ModuleList(ConvBlock(each, width, 3) for each in widths)
        self.fusion_blocks = nn.ModuleList(Fusion(width, first=i == 0) for i in range(len(widths)))
        self.project = ConvBlock(width, width, 3, norm=True, relu=True)
        self.conv_seg = nn.Conv2d(width, out, 1)

    def forward(self, features: Sequence[Maps]) -> Tensor:
        maps = [conv(x) for conv, x in zip(self.convs, self.reassemble_blocks(features), strict=True)]
        first, *others = self.fusion_blocks
        x = first(maps[-1])
        for fusion, finer in zip(others, maps[-2::-1], strict=True):
            x = fusion(x, finer)
        return cast(Tensor, self.conv_seg(self.project(x)))
