"""Transfer to small labelled sets: L2 logistic regression on standardised features, its strength chosen on validation.

Proteus, section 9.2 of its notes: twelve data sets, each scored by its own metric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.evaluate.metrics import eleven_points

STRENGTHS = 1.0 / np.logspace(-6, 5, 45)  # C, from weak to strong regularisation
RECALLS = np.linspace(0, 1, 11)  # upwards: rounding decides which points reach 0.3 and 0.7
MAX_ITERATIONS, TOLERANCE = 1000, 1e-12
Score = Callable[[Tensor, Tensor], float]  # labels, scores (M, C) -> 0..100, higher is better


def split_validation(count: int, seed: int = 0, share: float = 0.2) -> tuple[Tensor, Tensor]:
    """Indices of training and validation samples: the first `share` of a shuffled list validates."""
    order = np.random.RandomState(seed).permutation(count)
    held = int(share * count)
    return torch.from_numpy(order[held:]), torch.from_numpy(order[:held])


@dataclass(frozen=True)
class Standardised:
    """Features with mean 0 and population deviation 1 per channel: train and val by the statistics of train, trainval
    and test by those of both together."""

    train: Tensor
    val: Tensor
    trainval: Tensor
    test: Tensor


def standardise_splits(train_ND: Tensor, val_ND: Tensor, test_ND: Tensor) -> Standardised:
    """A channel without deviation becomes 0 (the released code makes it NaN)."""
    both_ND = torch.cat([train_ND, val_ND])
    train, val = _standardise(train_ND, train_ND), _standardise(val_ND, train_ND)
    return Standardised(train, val, _standardise(both_ND, both_ND), _standardise(test_ND, both_ND))


def _standardise(x_ND: Tensor, by_ND: Tensor) -> Tensor:
    std_D, mean_D = torch.std_mean(by_ND.double(), dim=0, correction=0)
    scaled_ND = (x_ND.double() - mean_D) / torch.where(std_D > 0, std_D, 1.0)
    return torch.where(std_D > 0, scaled_ND, 0.0)


@dataclass(frozen=True)
class LinearModel:
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)

    def scores(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.weight, self.bias)


def fit(x_ND: Tensor, labels_N: Tensor, classes: int, strength: float, start: LinearModel | None = None) -> LinearModel:
    """Minimum of strength * sum of cross-entropies + |w|^2 / 2 with a free bias, by L-BFGS in float64.

    labels_N: class numbers, or (N, C) of 0 and 1 for C one-vs-rest problems.  start: where to begin; the minimum is
    the same.
    """
    x_ND, several = x_ND.double(), labels_N.ndim == 2
    weight = x_ND.new_zeros(classes, x_ND.shape[1]) if start is None else start.weight.clone()
    bias = x_ND.new_zeros(classes) if start is None else start.bias.clone()
    solver = torch.optim.LBFGS([weight.requires_grad_(), bias.requires_grad_()], max_iter=MAX_ITERATIONS,
                               max_eval=4 * MAX_ITERATIONS, tolerance_grad=TOLERANCE * max(1.0, strength),
                               tolerance_change=0.0, history_size=20, line_search_fn="strong_wolfe")  # fmt: skip

    def objective() -> Tensor:
        solver.zero_grad()
        logits = F.linear(x_ND, weight, bias)
        errors = (
            F.binary_cross_entropy_with_logits(logits, labels_N.double(), reduction="sum")
            if several
            else F.cross_entropy(logits, labels_N, reduction="sum")
        )
        # Divided by the strength where it is large: the gradient's size decides when to stop.
        value: Tensor = (strength * errors + 0.5 * weight.square().sum()) / max(1.0, strength)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(objective)  # type: ignore[no-untyped-call]
    return LinearModel(weight.detach(), bias.detach())


def accuracy(labels_N: Tensor, scores_NC: Tensor) -> float:
    """Per cent of samples whose highest score is their class's."""
    return 100.0 * float((scores_NC.argmax(1) == labels_N).double().mean())


def mean_per_class(labels_N: Tensor, scores_NC: Tensor) -> float:
    """Per cent of samples whose highest score is their class's, averaged over the classes that have samples."""
    hits_N = (scores_NC.argmax(1) == labels_N).double()
    return 100.0 * float(torch.stack([hits_N[labels_N == c].mean() for c in sorted(set(labels_N.tolist()))]).mean())


def average_precisions(labels_NC: Tensor, scores_NC: Tensor) -> list[float]:
    """11-point average precision of every class, in per cent (VOC 2007)."""
    pairs = zip(labels_NC.numpy().T, scores_NC.numpy().T, strict=True)
    return [100.0 * eleven_points(labels[:, None], scores[:, None], RECALLS) for labels, scores in pairs]


def mean_average_precision(labels_NC: Tensor, scores_NC: Tensor) -> float:
    return float(np.mean(average_precisions(labels_NC, scores_NC)))


METRICS: dict[str, Score] = {
    "accuracy": accuracy, "mean-class-accuracy": mean_per_class, "mean AP": mean_average_precision,
}  # fmt: skip
DATASETS = {
    "cars": "accuracy", "cifar10": "accuracy", "cifar100": "accuracy", "dtd": "accuracy", "food": "accuracy",
    "sun397": "accuracy", "cub": "accuracy", "aircraft": "mean-class-accuracy",
    "caltech101": "mean-class-accuracy", "flowers": "mean-class-accuracy", "pets": "mean-class-accuracy",
    "voc2007": "mean AP",
}  # fmt: skip


@dataclass(frozen=True)
class Transfer:
    """What the search found: scores on validation for every strength, the first best one, its score on the test set."""

    val_scores: list[float]
    strength: float
    test_score: float


def transfer(
    data: Standardised,
    labels: tuple[Tensor, Tensor, Tensor],
    metric: str,
    strengths: Sequence[float] = tuple(STRENGTHS),
) -> Transfer:
    """Fit on train for each strength, keep the first that is strictly best on val, refit on trainval, test once.

    labels: of train, val and test, (N,) or (N, C).  metric: a key of METRICS.
    """
    score, (train, val, test) = METRICS[metric], labels
    classes = train.shape[1] if train.ndim == 2 else int(torch.cat(labels).max()) + 1
    found: list[float] = []
    model: LinearModel | None = None
    for strength in sorted(strengths):  # from strong to weak regularisation each fit starts near its end
        model = fit(data.train, train, classes, strength, model)
        found.append(score(val, model.scores(data.val)))
    by_strength = dict(zip(sorted(strengths), found, strict=True))
    val_scores = [by_strength[strength] for strength in strengths]
    best = strengths[int(np.argmax(val_scores))]
    final = fit(data.trainval, torch.cat([train, val]), classes, best)
    return Transfer(val_scores, float(best), score(test, final.scores(data.test)))
