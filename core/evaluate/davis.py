"""Video object segmentation without training: labels travel along the similarity of patch tokens (DAVIS-2017)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbourhood(height: int, width: int, radius: int, device: torch.device | None = None) -> Tensor:
    """(N, N) bool: which of the N = height x width places are at most `radius` rows and columns apart."""
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    return ((rows[:, None] - rows).abs() <= radius) & ((columns[:, None] - columns).abs() <= radius)


def propagate(
    target_ND: Tensor, context_FND: Tensor, labels_FChw: Tensor, *, topk: int = 5, radius: int = 12,
    temperature: float = 0.1,
) -> Tensor:  # fmt: skip
    """Soft labels (C, h, w) of a frame from earlier frames with labels (F, C, h, w), N = h x w.

    Every place takes the mean of the labels of its `topk` most similar places of all frames, within `radius` rows and
    columns (0: anywhere), weighted by exp(cosine / temperature). Ties with the last one are kept.
    """
    height, width = labels_FChw.shape[-2:]
    target, context = F.normalize(target_ND, dim=-1), F.normalize(context_FND, dim=-1).flatten(0, 1)
    weight_MN = ((context @ target.T) / temperature).exp()
    if radius > 0:
        near = neighbourhood(height, width, radius, weight_MN.device).T
        weight_MN = weight_MN * near.repeat(len(context_FND), 1)
    least_N = weight_MN.topk(min(topk, len(weight_MN)), dim=0).values[-1]
    weight_MN = torch.where(weight_MN < least_N, 0.0, weight_MN)
    labels_CM = labels_FChw.transpose(0, 1).flatten(1)
    return torch.matmul(labels_CM, weight_MN / weight_MN.sum(0)).view(-1, height, width)


def stretch(labels_Chw: Tensor) -> Tensor:
    """Each label's values to 0..1, before the highest one is taken; labels that are nowhere stay zero."""
    low, high = labels_Chw.amin((1, 2), keepdim=True), labels_Chw.amax((1, 2), keepdim=True)
    return torch.where(high > 0, (labels_Chw - low) / (high - low), labels_Chw)
