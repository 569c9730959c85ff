"""UDI's projection head (that of DINO) and the centre of its teacher's outputs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LastLayer(nn.Module):
    """Weight-normalised linear layer without bias, in float32 or wider: rows g v / |v|; names as released."""

    def __init__(self, bottleneck: int, out: int, train_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out, 1), requires_grad=train_gain)
        bound = bottleneck**-0.5
        self.weight_v = nn.Parameter(torch.empty(out, bottleneck).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(..., bottleneck) -> (..., out)."""
        v = _wide(self.weight_v)
        weight = _wide(self.weight_g) * v / torch.linalg.vector_norm(v, dim=1, keepdim=True)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(_wide(x), weight)


class ProjectionHead(nn.Module):
    """Linear layers to a normalised bottleneck, then cosines with `out` prototypes, scaled by their gains.

    layers: linear ones, with a GELU after each but the last; of a single one the names are `mlp.weight`, `mlp.bias`.
    """

    def __init__(self, dim: int, hidden: int, bottleneck: int, out: int, train_gain: bool, layers: int = 3) -> None:
        super().__init__()
        widths = [dim, *(layers - 1) * [hidden], bottleneck]
        linear = [nn.Linear(*pair) for pair in pairwise(widths)]
        for layer in linear:
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        behind = [part for layer in linear[1:] for part in (nn.GELU(), layer)]
        self.mlp = nn.Sequential(linear[0], *behind) if behind else linear[0]
        self.last_layer = LastLayer(bottleneck, out, train_gain)

    def bottleneck(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., bottleneck) of length 1, float32 or wider."""
        return F.normalize(_wide(self.mlp(x)), dim=-1, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out), float32 or wider."""
        return cast(Tensor, self.last_layer(self.bottleneck(x)))

    def flops(self, rows: float, last_rows: float) -> float:
        """Of `rows` to the bottleneck and `last_rows` through the last layer, two per multiply-add."""
        sizes = [(m.in_features, m.out_features) for m in self.mlp.modules() if isinstance(m, nn.Linear)]
        return 2 * (rows * sum(a * b for a, b in sizes) + last_rows * self.last_layer.weight_v.numel())


class Centre(nn.Module):
    """Running mean (L, K) of the teacher's logits, one row per level of the loss, moved after use."""

    center: Tensor

    def __init__(self, levels: int, out: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(levels, out, dtype=torch.float32))

    @torch.no_grad()
    def update(self, means_MLK: Tensor, momentum: float) -> None:
        """Move towards the mean over micro-batches of each one's own means, whatever their counts were."""
        self.center.mul_(momentum).add_(means_MLK.mean(0).to(self.center), alpha=1.0 - momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Centre:
        before = self.center  # 8 bits cannot hold a slow average
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if torch.finfo(self.center.dtype).bits < 32:
            self.center = before.to(self.center.device)
        return self
