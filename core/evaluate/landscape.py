"""Loss and accuracy around a minimum, along two filter-normalised directions (Li et al., arXiv 1712.09913)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

State = dict[str, Tensor]
FLOOR = 1e-10  # of a direction's norm


def direction(weights: Mapping[str, Tensor], generator: torch.Generator) -> State:
    """A Gaussian direction, filter-normalised; the same for all models of these shapes from one seed."""
    raw = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
    return filter_normalised(raw, weights)


def filter_normalised(raw: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> State:
    """Every filter (slice of the first axis) of `raw` with the norm of the same filter of the weights.

    One-dimensional tensors (biases, norms, layer scales) do not move.
    """
    return {name: _like_filters(raw[name].to(w), w) if w.ndim > 1 else torch.zeros_like(w)
            for name, w in weights.items()}  # fmt: skip


def _like_filters(raw: Tensor, weight: Tensor) -> Tensor:
    own, wanted = (tensor.flatten(1).norm(dim=1) for tensor in (raw, weight))
    factor: Tensor = (wanted / (own + FLOOR)).view(-1, *[1] * (weight.ndim - 1))
    return raw * factor


@torch.no_grad()
def surface(
    model: nn.Module,
    directions: tuple[State, State],
    alphas: Sequence[float],
    measure: Callable[[Callable[[Tensor], Tensor]], tuple[float, float]],
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy at weights + a d1 + b d2, float64 (A, A) each, a along the first axis and b along the second.

    measure: gets a function of images to outputs, returns loss and accuracy on the fixed evaluation images.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    out = torch.zeros(2, len(alphas), len(alphas), dtype=torch.float64)
    for i, a in enumerate(alphas):
        for j, b in enumerate(alphas):
            moved = {n: w + a * directions[0][n] + b * directions[1][n] for n, w in weights.items()}
            loss, accuracy = measure(lambda x, moved=moved: functional_call(model, moved, (x,)))  # type: ignore[misc]
            out[:, i, j] = torch.tensor([loss, accuracy], dtype=torch.float64)
    return out[0], out[1]


def classification(images: Tensor, labels: Tensor) -> Callable[[Callable[[Tensor], Tensor]], tuple[float, float]]:
    """Cross-entropy and share of hits on one batch, for `surface`."""

    def measure(forward: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        logits = forward(images)
        hits = (logits.argmax(-1) == labels).double().mean()
        return float(nn.functional.cross_entropy(logits, labels)), float(hits)

    return measure
