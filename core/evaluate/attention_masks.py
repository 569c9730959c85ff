"""Maps of what a class token attends to, to look at."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_masks(attention_hN: Tensor, side: int, patch: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Attention of a class token, (heads, P+N) with N = side^2 patches last -> masks and heat maps, (heads, H, W).

    A mask keeps the patches of highest attention that together hold more than 1 - the rest of the mass up to
    `threshold`: ascending shares are added up, and those beyond 1 - threshold stay. Pixels repeat their patch's value.
    """
    patches = attention_hN[:, -side * side :]
    shares, order = patches.sort(dim=1)
    kept = (shares / shares.sum(1, keepdim=True)).cumsum(1) > 1.0 - threshold
    mask = torch.zeros_like(kept).scatter_(1, order, kept)
    squares = [values.reshape(-1, side, side) for values in (mask, patches)]
    upright, heat = (x.repeat_interleave(patch, 1).repeat_interleave(patch, 2) for x in squares)
    return upright, heat
