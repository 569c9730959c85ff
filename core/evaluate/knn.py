"""Weighted k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from core.evaluate.features import FeatureSet

K = 20  # the number of neighbours in the papers' tables


def knn(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    k: Sequence[int],
    temperature: float = 0.07,
    *,
    num_classes: int,
    chunk: int = 256,
) -> dict[int, tuple[float, float, Tensor]]:
    """Each of the k nearest training samples by cosine votes for its class with weight exp(similarity / temperature).

    The protocol of the DINO family; there is no prior over classes, and equal votes rank by class number. Features need
    not be normalised.

    Args:
        k: numbers of neighbours to report; more than N counts as N.
        chunk: test samples compared at a time, bounds memory to chunk * N similarities.

    Returns:
        for each k: top-1 and top-5 accuracy in percent, and predicted classes (M,).
    """
    votes = knn_votes(train_ND, train_labels_N, test_MD, k, temperature, num_classes=num_classes, chunk=chunk)
    return {count: _accuracies(_ranked(votes_MC), test_labels_M) for count, votes_MC in votes.items()}


def knn_votes(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    k: Sequence[int],
    temperature: float = 0.07,
    *,
    num_classes: int,
    chunk: int = 256,
) -> dict[int, Tensor]:
    """Votes (M, C) for every k. They sum to one for the largest k alone: weights are a softmax over its neighbours."""
    train_ND, test_MD = F.normalize(train_ND, dim=1), F.normalize(test_MD, dim=1)
    most = min(max(k), len(train_ND))
    found: dict[int, list[Tensor]] = {count: [] for count in k}
    for rows_bD in torch.split(test_MD, chunk):
        similarity_bK, index_bK = (rows_bD @ train_ND.T).topk(most, dim=1)
        weight_bK = (similarity_bK / temperature).softmax(1)
        voted_bK = train_labels_N[index_bK]
        for count in k:
            votes_bC = weight_bK.new_zeros(len(rows_bD), num_classes)
            found[count].append(votes_bC.scatter_add_(1, voted_bK[:, :count], weight_bK[:, :count]))
    return {count: torch.cat(parts) for count, parts in found.items()}


def _ranked(votes_MC: Tensor) -> Tensor:
    return votes_MC.sort(dim=1, descending=True, stable=True).indices[:, :5]


def _accuracies(ranked_M5: Tensor, labels_M: Tensor) -> tuple[float, float, Tensor]:
    hits_M5 = ranked_M5 == labels_M.unsqueeze(1)
    top1, top5 = (100.0 * hits.double().mean().item() for hits in (hits_M5[:, 0], hits_M5.any(1)))
    return top1, top5, ranked_M5[:, 0]


def probe(train: FeatureSet, test: FeatureSet, num_classes: int, seed: int) -> dict[str, float]:
    """Top-1 and top-5 in percent with K neighbours; nothing is drawn, so the seed has no effect."""
    found = knn(train.features, train.labels, test.features, test.labels, [K], num_classes=num_classes)
    return {"top1": found[K][0], "top5": found[K][1]}
