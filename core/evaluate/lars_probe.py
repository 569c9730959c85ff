"""Linear probe of masked-image models: standardised features, one linear layer, LARS (arXiv 2111.06377, appendix A)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.optim_lars import Lars

WEIGHT_STD = 0.01


class LarsProbe(nn.Module):
    """Batch norm without affine and a linear classifier: features (B, D) -> logits (B, C)."""

    def __init__(self, dim: int, num_classes: int, eps: float = 1e-6, momentum: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=eps, momentum=momentum, affine=False)
        self.linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.linear.weight, std=WEIGHT_STD)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x_BD: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.norm(x_BD))
        return logits


def probe_step(model: LarsProbe, optimiser: Lars, x_BD: Tensor, labels_B: Tensor, lr: float) -> Tensor:
    """One step at this learning rate; returns the loss before it."""
    loss = F.cross_entropy(model(x_BD), labels_B)
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    return loss.detach()


def fit_probe(
    model: LarsProbe, batches: Iterable[tuple[Tensor, Tensor, float]], *, weight_decay: float = 0.0,
    momentum: float = 0.9, trust: float = 0.001,
) -> list[Tensor]:  # fmt: skip
    """Train on (features (B, D), labels (B,), lr) in the order given; returns the losses, 0-dimensional each."""
    optimiser = Lars(model.linear.parameters(), 0.0, weight_decay=weight_decay, momentum=momentum, trust=trust)
    model.train()
    losses = [probe_step(model, optimiser, x, labels, lr) for x, labels, lr in batches]
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: LarsProbe, x_ND: Tensor, labels_N: Tensor) -> float:
    """Top-1 in percent with the running statistics."""
    model.eval()
    return 100.0 * float((model(x_ND).argmax(-1) == labels_N).double().mean())
