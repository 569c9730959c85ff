"""Per-channel statistics of teacher features as mergeable moments, and the running standardisation made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

STD_FLOOR = 1e-6


def moments(z_D: Tensor) -> Tensor:
    """Mean and sum of squared deviations of (..., D) over all leading axes -> (2, D), float32 or wider.

    One such pair per micro-batch is all that ranks have to exchange. The deviations are taken from the mean itself, so
    a large offset costs no digits.
    """
    z_ND = z_D.reshape(-1, z_D.shape[-1]).to(torch.promote_types(z_D.dtype, torch.float32))
    var_D, mean_D = torch.var_mean(z_ND, dim=0, correction=0)
    return torch.stack([mean_D, var_D * z_ND.shape[0]])


def merge_moments(stacked_M2D: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Merge the moments of M parts of `count` tokens each into mean and unbiased standard deviation, (D,) each.

    The parts are always reduced in the order given: the same stack gives the same bits on every rank.

    Raises:
        ValueError: fewer than two tokens in all, for which an unbiased deviation does not exist.
    """
    total = stacked_M2D.shape[0] * count
    if total < 2:
        raise ValueError(f"statistics need at least two tokens per step, got {total}: use a larger train.batch")
    means_MD, squares_MD = stacked_M2D.unbind(1)
    mean_D = means_MD.mean(0)
    squares_D = squares_MD.sum(0) + count * (means_MD - mean_D).square().sum(0)
    return mean_D, (squares_D / (total - 1)).sqrt()


def standardise(z_D: Tensor, mean_D: Tensor, std_D: Tensor, floor: float = STD_FLOOR) -> Tensor:
    """(z - mean) / (std + floor) over the last axis: (..., D) -> (..., D) in float32 or wider."""
    return (z_D.to(torch.promote_types(z_D.dtype, mean_D.dtype)) - mean_D) / (std_D + floor)


class RunningStats(nn.Module):
    """Standardise with running statistics that are updated after use (UNIC, release `utils`).

    forward: (z - m) / (s + 1e-6) with the statistics as they are; update: m <- (1-a) m + a mean and
    s <- (1-a) s + a (std + 1e-6). The floor enters twice, and it is the deviation that is averaged, not the variance.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, floor: float = STD_FLOOR) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("mean", torch.zeros(dim, dtype=torch.float32))
        self.register_buffer("std", torch.ones(dim, dtype=torch.float32))

    def forward(self, z_D: Tensor) -> Tensor:
        """(..., D) -> (..., D) in float32 or wider."""
        return standardise(z_D, self.mean, self.std, self.floor)

    @torch.no_grad()
    def update(self, mean_D: Tensor, std_D: Tensor, momentum: float) -> None:
        """Move by `momentum` (1 replaces, 0 leaves alone) towards the statistics of a batch, (D,) each."""
        self.mean.mul_(1.0 - momentum).add_(mean_D, alpha=momentum)
        self.std.mul_(1.0 - momentum).add_(std_D + self.floor, alpha=momentum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningStats:
        # A model cast to bf16 as a whole must not take its statistics along: 8 bits cannot hold a slow average.
        before = {"mean": self.mean, "std": self.std}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = cast(Tensor, getattr(self, name))
            if torch.finfo(new.dtype).bits < 32:
                setattr(self, name, old.to(new.device))
        return self
