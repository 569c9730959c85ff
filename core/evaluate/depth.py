"""Depth estimation: the scale-invariant log loss, the metrics of NYU Depth v2 and the published parameter groups.

Proteus, section 9.4 of its notes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from core.evaluate.dense import multiplier_groups

RANGE_M = (1e-3, 10.0)  # depths that count
INDOOR_ROWS, INDOOR_COLUMNS = (45, 471), (41, 601)  # of 480x640 images
# Longer names win: tokens and table keep the full rate. "norm" fits no name of the backbone, so its norms are decayed.
GROUP_RULES = {"backbone": (0.1, 1.0), "cls_token": (1.0, 0.0), "pos_embed": (1.0, 0.0), "norm": (1.0, 0.0)}


def silog(pred: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """Mean over images of sqrt(mean d^2 - mean(d)^2 / 2), d = log target - log max(pred, eps): two of (B, 1, H, W).

    Pixels whose target is not above eps do not count; an image without others adds 0.
    """
    target_BN, pred_BN = target.flatten(1), pred.flatten(1)
    valid_BN = target_BN > eps
    count_B = valid_BN.sum(1).clamp(min=1)
    d_BN = torch.where(valid_BN, target_BN.clamp(min=eps).log() - pred_BN.clamp(min=eps).log(), 0.0)
    spread_B = d_BN.square().sum(1) / count_B - 0.5 * (d_BN.sum(1) / count_B).square()
    positive_B = spread_B > 0  # the root has no slope at 0
    root_B = torch.where(positive_B, spread_B, 1.0).sqrt()
    return torch.where(positive_B, root_B, 0.0).mean()


def counted(target: Tensor, rows: tuple[int, int] = INDOOR_ROWS, columns: tuple[int, int] = INDOOR_COLUMNS,
            limits: tuple[float, float] = RANGE_M) -> Tensor:  # fmt: skip
    """Pixels (..., H, W) bool that the metrics count: depths between the limits, inside of the crop."""
    inside = torch.zeros_like(target, dtype=torch.bool)
    inside[..., slice(*rows), slice(*columns)] = True
    return inside & (target > limits[0]) & (target < limits[1])


def depth_metrics(pred: Tensor, target: Tensor, valid: Tensor) -> dict[str, float]:
    """Metrics of one depth map in metres, over the pixels of `valid`; all three (H, W), predictions above 0.

    d1, d2, d3: share of pixels with max(p / t, t / p) below 1.25, 1.25^2, 1.25^3.  silog: as in the loss.
    """
    p, t = pred[valid], target[valid]
    ratio, difference, logs = torch.maximum(t / p, p / t), t - p, p.log() - t.log()
    found = {f"d{i}": (ratio < 1.25**i).to(p.dtype).mean() for i in (1, 2, 3)}
    found |= {
        "abs_rel": (difference.abs() / t).mean(),
        "sq_rel": (difference.square() / t).mean(),
        "rmse": difference.square().mean().sqrt(),
        "rmse_log": logs.square().mean().sqrt(),
        "log10": (p.log10() - t.log10()).abs().mean(),
        "silog": (logs.square().mean() - 0.5 * logs.mean().square()).sqrt(),
    }
    return {name: float(value) for name, value in found.items()}


def depth_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups {params, names, weight_decay, lr_scale}: the backbone at a tenth of the rate, but for tokens and table."""
    return multiplier_groups(named_parameters, weight_decay, GROUP_RULES)
