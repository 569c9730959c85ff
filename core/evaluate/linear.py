"""Linear probe: logistic regression by SGD on frozen features, all points of a small search trained as one product."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from core.evaluate.features import FeatureSet
from core.evaluate.labelled import check_choice

LEARNING_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
WEIGHT_DECAYS = (1e-12, 1e-8, 1e-6, 1e-4)


def epoch_lr(epoch: int, lr: float, epochs: int) -> float:
    """Cosine per epoch, set after each epoch with that epoch's own index: epochs 0 and 1 both run at the full rate."""
    return 0.5 * lr * (1.0 + math.cos(math.pi * max(epoch - 1, 0) / epochs))


def cosine_lr(epoch: int, lr: float, epochs: int) -> float:
    """Cosine per epoch from the full rate towards 0, as DINO's and UDI's probes have it."""
    return 0.5 * lr * (1.0 + math.cos(math.pi * epoch / epochs))


@dataclass(frozen=True)
class Classifiers:
    """G linear classifiers trained side by side, and the learning rates (G, epochs) they were trained with."""

    weight: Tensor  # (G, C, D)
    bias: Tensor  # (G, C)
    lr_used: list[list[float]]
    losses: Tensor  # (G, epochs): mean over the batches of an epoch

    def logits(self, x_ND: Tensor) -> Tensor:
        """(N, D) -> (G, N, C)."""
        return _logits(x_ND, self.weight, self.bias).transpose(0, 1)


def _logits(x_BD: Tensor, weight_GCD: Tensor, bias_GC: Tensor) -> Tensor:
    """(B, D) -> (B, G, C), as one product over the stacked classifiers."""
    flat = F.linear(x_BD, weight_GCD.flatten(0, 1), bias_GC.flatten())
    return flat.view(len(x_BD), *bias_GC.shape)


def initial(num_classes: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,), uniform in +-1/sqrt(D): the default of a torch Linear, from a given generator."""
    bound = 1.0 / math.sqrt(dim)
    weight, bias = torch.empty(num_classes, dim), torch.empty(num_classes)
    return weight.uniform_(-bound, bound, generator=generator), bias.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def train_linear(
    x_ND: Tensor,
    labels_N: Tensor,
    lr_G: Sequence[float],
    weight_decay_G: Sequence[float],
    *,
    weight_CD: Tensor,
    bias_C: Tensor,
    orders: Sequence[Tensor] | Tensor,
    momentum: float = 0.9,
    batch: int = 1024,
    schedule: Callable[[int, float, int], float] = epoch_lr,
) -> Classifiers:
    """Softmax regression by SGD with momentum for G (lr, weight decay) points at once, which see the same batches.

    One epoch per row of `orders` (epochs, N), the last short batch included; the bias is decayed as well
    (t-ReX protocol, section 9 of the UNIC notes).

    Args:
        weight_CD, bias_C: the common start of all points.
        schedule: (epoch, lr, epochs) -> the rate of that epoch.
    """
    points, epochs = len(lr_G), len(orders)
    weight_GCD = weight_CD.to(x_ND).repeat(points, 1, 1)
    bias_GC = bias_C.to(x_ND).repeat(points, 1)
    speed_GCD, speed_GC = torch.zeros_like(weight_GCD), torch.zeros_like(bias_GC)
    decay_G = torch.tensor(weight_decay_G, dtype=x_ND.dtype, device=x_ND.device)
    lr_used = [[schedule(epoch, lr, epochs) for epoch in range(epochs)] for lr in lr_G]
    rates_EG = torch.tensor(lr_used, dtype=x_ND.dtype, device=x_ND.device).T
    loss_EG = torch.zeros_like(rates_EG)
    for loss_G, rate_G, order_N in zip(loss_EG, rates_EG, orders, strict=True):
        for index_B in order_N.to(x_ND.device).split(batch):
            x_BD = x_ND[index_B]
            wanted_BC = x_BD.new_zeros(len(x_BD), len(bias_C)).scatter_(1, labels_N[index_B].unsqueeze(1), 1.0)
            log_BGC = _logits(x_BD, weight_GCD, bias_GC).log_softmax(-1)
            loss_G -= (log_BGC * wanted_BC.unsqueeze(1)).sum((0, 2)) / (len(x_BD) * -(-len(order_N) // batch))
            error_BGC = (log_BGC.exp() - wanted_BC.unsqueeze(1)) / len(x_BD)
            slope_GCD = (error_BGC.flatten(1).T @ x_BD).view_as(weight_GCD)
            speed_GCD.mul_(momentum).add_(slope_GCD + decay_G.view(-1, 1, 1) * weight_GCD)
            speed_GC.mul_(momentum).add_(error_BGC.sum(0) + decay_G.view(-1, 1) * bias_GC)
            weight_GCD -= rate_G.view(-1, 1, 1) * speed_GCD
            bias_GC -= rate_G.view(-1, 1) * speed_GC
    return Classifiers(weight_GCD, bias_GC, lr_used, loss_EG.T)


def shuffled_classes(labels_N: Tensor, generator: torch.Generator) -> dict[int, Tensor]:
    """Sample indices of every class, in a random order: class -> (count,)."""
    groups = {c: (labels_N == c).nonzero().flatten() for c in sorted(set(labels_N.tolist()))}
    return {c: index[torch.randperm(len(index), generator=generator)] for c, index in groups.items()}


def split_trainval(
    shuffled: Mapping[int, Tensor], share: float = 0.2, *, released_bug: bool = False
) -> tuple[Tensor, Tensor]:
    """Training and validation indices: the last int(count * share) samples of every class validate.

    A class too small for that gives one sample for validation (none if it has a single one). With `released_bug` its
    1/count becomes the share of all later classes, as in the released evaluation code: for comparison with it only.

    Args:
        shuffled: class -> sample indices in random order, see `shuffled_classes`; classes are taken in sorted order.

    Raises:
        ValueError: with `released_bug`, a class of a single sample, which the released code refuses.
    """
    train, val = [], []
    for label in sorted(shuffled):
        index = shuffled[label]
        count = int(len(index) * share)
        if count == 0 and released_bug:
            if len(index) < 2:
                raise ValueError(f"class {label} has one sample; the released split needs two: use released_bug=False")
            share = 1 / len(index)
        count = max(count, min(1, len(index) - 1))
        train.append(index[: len(index) - count])
        val.append(index[len(index) - count :])
    return torch.cat(train), torch.cat(val)


@dataclass(frozen=True)
class Probe:
    """What the linear probe found: test accuracies in percent, the chosen point and its validation accuracy."""

    top1: float
    top5: float
    lr: float
    weight_decay: float
    val_top1: float


def linear_probe(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    *,
    num_classes: int,
    seed: int = 22,
    epochs: int = 100,
    batch: int = 1024,
    learning_rates: Sequence[float] = LEARNING_RATES,
    weight_decays: Sequence[float] = WEIGHT_DECAYS,
    share: float = 0.2,
) -> Probe:
    """Logistic regression on L2-normalised features.

    The learning rate and weight decay that do best on a fifth of the training samples (of every class) are refitted on
    all of them and meet the test samples once. Everything drawn comes from `seed`.
    """
    generator = torch.Generator().manual_seed(seed)
    train_ND, test_MD = F.normalize(train_ND, dim=1), F.normalize(test_MD, dim=1)
    start = initial(num_classes, train_ND.shape[1], generator)

    def fit(index_n: Tensor, lrs: Sequence[float], decays: Sequence[float]) -> Classifiers:
        orders = [torch.randperm(len(index_n), generator=generator) for _ in range(epochs)]
        x, y = train_ND[index_n], train_labels_N[index_n]
        return train_linear(x, y, lrs, decays, weight_CD=start[0], bias_C=start[1], orders=orders, batch=batch)

    grid = list(product(learning_rates, weight_decays))
    fit_n, val_m = split_trainval(shuffled_classes(train_labels_N.cpu(), generator), share)
    fit_n, val_m = fit_n.to(train_ND.device), val_m.to(train_ND.device)
    search = fit(fit_n, [lr for lr, _ in grid], [decay for _, decay in grid]).logits(train_ND[val_m])
    val_top1_G = 100.0 * (search.argmax(-1) == train_labels_N[val_m]).double().mean(-1)
    best = int(val_top1_G.argmax())
    lr, decay = grid[best]
    logits_MC = fit(torch.arange(len(train_ND), device=train_ND.device), [lr], [decay]).logits(test_MD)[0]
    hits_M5 = logits_MC.topk(min(5, num_classes), dim=1).indices == test_labels_M.unsqueeze(1)
    top1, top5 = (100.0 * hits.double().mean().item() for hits in (hits_M5[:, 0], hits_M5.any(1)))
    return Probe(top1, top5, lr, decay, float(val_top1_G[best]))


def probe(train: FeatureSet, test: FeatureSet, num_classes: int, seed: int) -> dict[str, float]:
    """Test accuracies in percent of the linear probe, with the point of the search that was chosen.

    Raises ConfigError where no class has two training samples: there is nothing to choose by.
    """
    check_choice(["linear"], int(train.labels.bincount().max()))
    found = linear_probe(train.features, train.labels, test.features, test.labels, num_classes=num_classes, seed=seed)
    return dataclasses.asdict(found)
