"""LARS: SGD whose step length follows each weight tensor's own norm (You et al., arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Lars(torch.optim.Optimizer):
    """SGD with momentum on d = q (g + weight_decay w), w <- w - lr m with m <- momentum m + d.

    q = trust |w| / |g + weight_decay w|, and 1 where either norm is zero. One-dimensional tensors (biases, norms) are
    neither decayed nor rescaled.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("Lars takes one step from the gradients that are there; it cannot evaluate a closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        update, state = parameter.grad, self.state[parameter]
        if parameter.ndim > 1:
            update = update + group["weight_decay"] * parameter
            update = update * _adaptation(parameter, update, group["trust"])
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(group["momentum"]).add_(update)
        parameter.sub_(group["lr"] * state["momentum"])


def _adaptation(weight: Tensor, update: Tensor, trust: float) -> Tensor:
    """trust |weight| / |update|, a 0-dimensional tensor; 1 where either norm is zero."""
    length, step = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(update)
    usable = (length > 0) & (step > 0)
    return torch.where(usable, trust * length / step, torch.ones_like(length))
