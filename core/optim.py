"""Parameter groups and gradient clipping as the methods define them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def decay_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    weight_decay: float,
    names_without_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay, in the order of the parameters given.

    Biases and one-dimensional tensors are not decayed, nor are parameters whose name is in `names_without_decay` or
    ends with ".<entry>" of it. Frozen parameters are left out. Tokens and position tables are decayed unless named.

    Returns:
        [{"params", "names", "weight_decay": weight_decay}, {"params", "names", "weight_decay": 0.0}]
    """
    exempt = tuple(f".{name}" for name in names_without_decay)
    decayed: dict[str, Any] = {"params": [], "names": [], "weight_decay": weight_decay}
    free: dict[str, Any] = {"params": [], "names": [], "weight_decay": 0.0}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        is_free = parameter.ndim <= 1 or name.endswith(".bias") or f".{name}".endswith(exempt)
        group = free if is_free else decayed
        group["params"].append(parameter)
        group["names"].append(name)
    return [decayed, free]


@torch.no_grad()
def clip_per_parameter(grads: Sequence[Tensor | None], max_norm: float, eps: float = 1e-6) -> Tensor:
    """Scale each gradient by min(1, max_norm / (its own norm + eps)), in place and without a host synchronisation.

    Args:
        grads: gradients; None (a parameter off the loss path) is skipped.
        max_norm: largest norm that a single gradient may keep, > 0.

    Returns:
        the norms before clipping of the gradients that are there, in order.
    """
    if max_norm <= 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}: leave the call out to train without clipping")
    present = [grad for grad in grads if grad is not None]
    if not present:
        return torch.zeros(0)
    norms = torch.stack([_norm(grad) for grad in present])
    scales = (max_norm / (norms + eps)).clamp(max=1.0)
    for grad, scale in zip(present, scales.unbind(), strict=True):
        grad.mul_(scale)
    return norms


def _norm(grad: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    return norm
