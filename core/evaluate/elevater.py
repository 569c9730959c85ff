"""The linear probe of the ELEVATER toolkit on stored features: split, training, and the search for its two settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from core.evaluate.metrics import metric

Ints = NDArray[np.int64]
LEARNING_RATES = tuple(np.logspace(-6, -1, 6).tolist())
DECAYS, COARSE, SPANS = 97, 16, (8, 4, 2, 1)
BN_MOMENTUM, BN_EPS = 0.1, 1e-5


def split_trainval(labels: Ints, share: float = 0.2) -> tuple[Ints, Ints]:
    """Indices for training and validation; `labels` (N,) are classes or (N, C) of zeros and ones.

    The first ceil(share * count) samples of every class in file order validate.  With several labels a sample: class
    by class the first samples not yet taken, until ceil(share * count) of each are, whatever they were taken for.
    """
    if labels.ndim == 1:
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        val = np.sort(np.concatenate([group[: math.ceil(len(group) * share)] for group in groups]))
    else:
        val = _greedy(labels.astype(np.float64), share)
    return np.setdiff1d(np.arange(len(labels)), val), val


def _greedy(labels_NC: NDArray[np.float64], share: float) -> Ints:
    wanted_C, free_NC, taken = np.ceil(labels_NC.sum(0) * share), labels_NC.copy(), []
    while (wanted_C > 0).any():
        label = int(np.flatnonzero(wanted_C > 0)[0])
        sample = int(np.flatnonzero(free_NC[:, label])[0])
        taken.append(sample)
        wanted_C -= labels_NC[sample]
        free_NC[sample] = 0
    return np.array(taken, np.int64)


@dataclass
class Standardiser:
    """Batch normalisation without scale and shift, from running statistics of the features of a probe's batches."""

    mean: Tensor  # (D,)
    var: Tensor  # (D,)

    def update(self, x_BD: Tensor) -> Tensor:
        """The batch standardised by its own statistics, which enter the running ones."""
        var_D, mean_D = torch.var_mean(x_BD, dim=0, correction=0)
        self.mean = torch.lerp(self.mean, mean_D, BN_MOMENTUM)
        self.var = torch.lerp(self.var, var_D * len(x_BD) / (len(x_BD) - 1), BN_MOMENTUM)
        return (x_BD - mean_D) / (var_D + BN_EPS).sqrt()

    def __call__(self, x_ND: Tensor) -> Tensor:
        return (x_ND - self.mean) / (self.var + BN_EPS).sqrt()


@dataclass(frozen=True)
class Trained:
    """A probe after its last epoch, its validation scores in percent, and what it said at its best epoch.

    The toolkit reports the best epoch on whatever it validates with, the test set in the final run: `best` is that
    optimistic number, `scores[-1]` the honest one.
    """

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    standardiser: Standardiser
    scores: list[float]
    best: float
    best_probabilities: Tensor | None  # (N, C)


@torch.no_grad()
def train_probe(
    train_ND: Tensor,
    labels: Tensor,
    val_MD: Tensor,
    val_labels: Tensor,
    *,
    weight_CD: Tensor,
    lr: float,
    weight_decay: float,
    orders: Iterable[Tensor],
    batch: int = 64,
    momentum: float = 0.9,
    metric_name: str = "accuracy",
) -> Trained:
    """A linear head on standardised features by SGD at a constant rate, one epoch per row of `orders`.

    The head starts at `weight_CD` (the zero-shot text classifier) and bias 0; weight decay bears on both.  labels:
    (N,) classes for cross-entropy, or (N, C) of zeros and ones for a logistic loss of each class; scores are softmaxed
    either way.  A trailing batch of one sample is skipped.
    """
    weight_CD, bias_C = weight_CD.clone(), weight_CD.new_zeros(len(weight_CD))
    speeds = [torch.zeros_like(weight_CD), torch.zeros_like(bias_C)]
    standardiser = Standardiser(train_ND.new_zeros(train_ND.shape[1]), train_ND.new_ones(train_ND.shape[1]))
    wanted_NC = labels.to(train_ND.dtype) if labels.ndim == 2 else F.one_hot(labels, len(weight_CD)).to(train_ND.dtype)
    scores: list[float] = []
    best, best_probabilities = 0.0, None
    for order in orders:
        for index in torch.split(order, batch):
            if len(index) > 1:
                x_BD = standardiser.update(train_ND[index])
                error_BC = _error(F.linear(x_BD, weight_CD, bias_C), wanted_NC[index], labels.ndim == 2)
                for value, speed, slope in zip((weight_CD, bias_C), speeds, (error_BC.T @ x_BD, error_BC.sum(0)),
                                               strict=True):  # fmt: skip
                    speed.mul_(momentum).add_(slope + weight_decay * value)
                    value.sub_(lr * speed)
        probabilities = F.linear(standardiser(val_MD), weight_CD, bias_C).softmax(-1)
        scores.append(100 * metric(metric_name)(val_labels.cpu().numpy(), probabilities.cpu().numpy()))
        if scores[-1] > best:
            best, best_probabilities = scores[-1], probabilities
    return Trained(weight_CD, bias_C, standardiser, scores, best, best_probabilities)


def _error(logits_BC: Tensor, wanted_BC: Tensor, multilabel: bool) -> Tensor:
    """Slope of the mean loss by the logits."""
    if multilabel:
        return (logits_BC.sigmoid() - wanted_BC) / wanted_BC.numel()
    return (logits_BC.softmax(-1) - wanted_BC) / len(wanted_BC)


@dataclass(frozen=True)
class Search:
    lr: float
    weight_decay: float
    trials: list[tuple[float, float, float]]  # (lr, weight decay, score) in the order tried; NaN where it failed


def search(
    score: Callable[[float, float], float],
    learning_rates: Sequence[float] = LEARNING_RATES,
    log_range: tuple[float, float] = (-6, 6),
    left_only: bool = False,
) -> Search:
    """The learning rate and weight decay with the best score, out of 97 decays on a logarithmic scale for each rate.

    Every 16th decay is tried, then the two neighbours at 8, 4, 2 and 1 steps of the best so far; only a strictly better
    score wins, and none does that is not above 0.  `left_only` repeats a fault of another release, which tries the left
    neighbour's decay twice and books the second trial for the right one.  A trial that raises, or whose score is NaN,
    counts as nothing.  Raises what the last trial raised when none has a score.
    """
    failure: Exception | None = None

    def scored(lr: float, decay: float) -> float:
        nonlocal failure
        try:
            return float(score(lr, decay))
        except Exception as error:  # of whatever kind: a rate that is too high ends in overflow, NaN or no solution
            failure = error
            return math.nan

    decays = np.logspace(*log_range, DECAYS).tolist()
    trials: list[tuple[float, float, float]] = []
    winner, top = (0.0, 0.0), 0.0
    for lr in learning_rates:
        place, peak = -1, 0.0

        def attempt(candidate: int, tried: int, lr: float = lr) -> None:
            nonlocal place, peak
            trials.append((lr, decays[tried], scored(lr, decays[tried])))
            if trials[-1][2] > peak:
                place, peak = candidate, trials[-1][2]

        for candidate in range(0, DECAYS, COARSE):
            attempt(candidate, candidate)
        for span in SPANS:
            left, right = max(place - span, 0), min(place + span, DECAYS - 1)
            for candidate in [each for each in (left, right) if each != place]:
                attempt(candidate, left if left_only else candidate)
        if peak > top:
            winner, top = (lr, decays[place]), peak
    if failure is not None and all(math.isnan(value) for _, _, value in trials):
        raise failure
    return Search(*winner, trials)


def trainable(names: Iterable[str], frozen: Sequence[str] = ("visual",), prefix: str = "backbone.") -> list[str]:
    """Parameters that the toolkit trains in a probe with a "frozen" backbone: those not named after `frozen`.

    A projection that is not called visual.* is trained along, as that of the released DIME-FM students is; freeze
    ("visual", "vision_projection") for a probe that trains the head alone.
    """
    return [name for name in names if not name.startswith(tuple(prefix + part for part in frozen))]
