"""Distillation losses: pure functions of tensors, in float32 or wider, whatever the precision of their inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_FLOOR = 1e-8


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosine_distance(pred: Tensor, target: Tensor) -> Tensor:
    """1 - <p, t> / (max(|p|, 1e-8) max(|t|, 1e-8)) over the last axis: (..., D), (..., D) -> (...)."""
    return 1.0 - F.cosine_similarity(_wide(pred), _wide(target), dim=-1, eps=NORM_FLOOR)


def smooth_l1(pred: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    """Huber distance averaged over channels, d^2 / (2 beta) below beta and d - beta / 2 above: (..., D) -> (...)."""
    return F.smooth_l1_loss(_wide(pred), _wide(target), reduction="none", beta=beta).mean(-1)


def drop_teachers(loss_TB: Tensor, u_TB: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Leave out, image by image, teachers that are already well imitated (UNIC, arXiv 2408.05088, teacher dropping).

    The teacher with the largest loss of an image is always kept (the first one on ties); every other one is dropped
    when its uniform draw is below p. Kept pairs weigh the same, so an image with four kept teachers weighs four times
    one with a single teacher: loss = sum(keep * loss) / sum(keep).

    Args:
        loss_TB: losses per (teacher, image).
        u_TB: draws in [0, 1); not looked at (may be NaN) where the teacher is kept unconditionally.
        p: probability of dropping a teacher that is not the worst one.

    Returns:
        the scalar loss, differentiable through loss_TB alone, and the kept pairs (T, B) bool.
    """
    worst_B = loss_TB.detach().argmax(dim=0)
    keep_TB = ~(u_TB < p)
    keep_TB = keep_TB.scatter(0, worst_B.unsqueeze(0), True)
    loss = torch.where(keep_TB, loss_TB, torch.zeros_like(loss_TB)).sum() / keep_TB.sum()
    return loss, keep_TB


def soft_cross_entropy(logits_BC: Tensor, targets_BC: Tensor) -> Tensor:
    """Cross-entropy with soft targets, - sum_c t log softmax(z), averaged over the batch: (B, C), (B, C) -> scalar."""
    return -(_wide(targets_BC) * F.log_softmax(_wide(logits_BC), dim=-1)).sum(-1).mean()


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """(p - t)^2 averaged over channels: (..., D), (..., D) -> (...)."""
    return F.mse_loss(_wide(pred), _wide(target), reduction="none").mean(-1)
