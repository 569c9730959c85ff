"""Scores of predictions as the ELEVATER image-classification toolkit defines them, as shares of one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from core.config import ConfigError, nearest

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]
RECALLS = np.linspace(1, 0, 11)  # downwards, as in the toolkit: rounding decides which points reach 0.3


def accuracy(labels_N: Ints, scores_NC: Floats) -> float:
    """Share of samples whose highest score, the first on ties, is their class's."""
    return float((scores_NC.argmax(1) == labels_N).mean())


def mean_per_class(labels_N: Ints, scores_NC: Floats) -> float:
    """Accuracy averaged over classes. The scores of classes without a sample are removed before the highest counts."""
    present = np.unique(labels_N)
    hits = present[scores_NC[:, present].argmax(1)] == labels_N
    return float(np.mean([hits[labels_N == label].mean() for label in present]))


def _curve(positive_N: Ints, score_N: Floats) -> tuple[Floats, Floats]:
    """Precision and recall at every distinct score, from the highest down; begins with precision 1 at recall 0."""
    order = np.argsort(-score_N, kind="stable")
    hits = np.cumsum(positive_N[order] > 0)
    last = np.append(np.flatnonzero(np.diff(score_N[order])), len(order) - 1)  # of equal scores
    recall = hits[last] / hits[-1] if hits[-1] else np.zeros(len(last))
    return np.append(1.0, hits[last] / (last + 1)), np.append(0.0, recall)


def eleven_points(labels_NC: Ints, scores_NC: Floats, recalls: Floats = RECALLS) -> float:
    """Mean over classes of the best precision at any recall of at least each of `recalls`, averaged over these."""
    found = []
    for positive_N, score_N in zip(labels_NC.T, scores_NC.T, strict=True):
        precision, recall = _curve(positive_N, score_N)
        found.append(np.mean([precision[recall >= r].max(initial=0.0) for r in recalls]))
    return float(np.mean(found))


def roc_auc(labels_N: Ints, scores_N2: Floats) -> float:
    """Probability that a positive sample scores above a negative one in column 1; ties count half."""
    _, inverse, counts = np.unique(scores_N2[:, 1], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positive = labels_N > 0
    many, few = int(positive.sum()), int((~positive).sum())
    if not many or not few:
        raise ValueError("the area under the curve needs samples of both classes")
    return float((ranks[positive].sum() - many * (many + 1) / 2) / (many * few))


METRICS: dict[str, Callable[[Ints, Floats], float]] = {
    "accuracy": accuracy, "mean-per-class": mean_per_class, "11point_mAP": eleven_points, "roc_auc": roc_auc,
}  # fmt: skip


def metric(name: str) -> Callable[[Ints, Floats], float]:
    """A metric by the toolkit's name.  Raises ConfigError for an unknown one."""
    if name not in METRICS:
        raise ConfigError(f"metric {name!r} is unknown{nearest(name, list(METRICS))} (known: {', '.join(METRICS)})")
    return METRICS[name]
