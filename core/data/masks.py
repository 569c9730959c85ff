"""Which patches of which samples of a micro-batch are masked (Proteus, section 5 of its notes; iBOT's random masks).

The draws come in as arguments, so that the arithmetic is one for keyed draws, recorded ones and evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.config import ConfigError

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Masks:
    """Masks of a micro-batch of B samples with N patches each, K masked patches in all.

    masks: (B, N) bool.  index: (K,) positions in B * N, ascending.  weight: (K,) float32, one over the masked patches
    of the sample.
    """

    masks: Bools
    index: Ints
    weight: NDArray[np.float32]


def check_masking(probability: float, ratio: Sequence[float], tokens: int, field: str) -> None:
    """Raises ConfigError unless masks of these settings hide at least one patch and leave at least one."""
    if not 0 < probability <= 1:
        raise ConfigError(
            f"{field}.mask_probability: must lie in (0, 1], got {probability}; to train without masks set the weight "
            "of the patch loss to 0"
        )
    ends = [int(tokens * share) for share in ratio]
    if len(ratio) not in (1, 2) or ratio[0] > ratio[-1] or ends[0] < 1 or ends[-1] >= tokens:
        raise ConfigError(
            f"{field}.mask_ratio: give one share or a range [low, high] that masks at least 1 and fewer than all of "
            f"the {tokens} patches, got {list(ratio)}"
        )


def masked_samples(batch: int, probability: float) -> int:
    """How many samples of a micro-batch are masked."""
    return int(batch * probability)


def ratio_bins(samples: int, ratio: Sequence[float]) -> NDArray[np.float32]:
    """Edges (samples + 1,) of equal bins of the range of ratios: sample i draws its ratio from bin i.

    In float32 as released, which decides the count where an edge times the patches is a whole number.
    """
    edges: NDArray[np.float32] = torch.linspace(ratio[0], ratio[-1], samples + 1, dtype=torch.float32).numpy()
    return edges


def mask_counts(samples: int, tokens: int, ratio: Sequence[float], u_n: NDArray[np.floating] | None = None) -> Ints:
    """Masked patches of each masked sample (samples,).

    u_n: ratios drawn for a range, one from each of `ratio_bins`; not looked at for a single ratio.
    """
    if len(ratio) == 1:
        return np.full(samples, int(tokens * ratio[0]), np.int64)
    assert u_n is not None
    return np.array([int(tokens * u) for u in u_n[:samples]], np.int64)


def most_masked(samples: int, tokens: int, ratio: Sequence[float]) -> int:
    """Upper bound of K, whatever is drawn."""
    tops = ratio_bins(samples, ratio)[1:] if len(ratio) == 2 else [ratio[0]] * samples
    return sum(int(tokens * top) for top in tops)


def smallest(draws_nN: NDArray[np.float64], counts_n: Ints) -> Bools:
    """(n, N) bool: in row i the patches with the counts_n[i] smallest draws, which is uniform over all such sets."""
    rank_nN = draws_nN.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return rank_nN < counts_n[:, None]


def place_masks(marked_nN: Bools, batch: int, order_B: Ints | None = None) -> Masks:
    """Hand out n masks to the samples of a micro-batch; the others are not masked.

    order_B: sample b gets mask order_B[b] if that is below n (None: the first n samples get them).
    """
    masks_BN = np.zeros((batch, marked_nN.shape[1]), np.bool_)
    masks_BN[: len(marked_nN)] = marked_nN
    masks_BN = masks_BN if order_B is None else masks_BN[order_B]
    weight_B = 1.0 / masks_BN.sum(1).clip(min=1)
    return Masks(masks_BN, np.flatnonzero(masks_BN), np.repeat(weight_B, masks_BN.sum(1)).astype(np.float32))


def round_to_half(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) with their values rounded to half precision, as the released collate hands them on."""
    return images.half().to(images.dtype)
