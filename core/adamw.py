"""AdamW under ZeRO: clipping per parameter across fragments, and groups that rest at first."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from core.optim import clip_per_parameter
from core.recipe import Train

MOMENTS = ("exp_avg", "exp_avg_sq")


class ClippedAdamW(torch.optim.AdamW):
    """AdamW that bounds each parameter's own gradient norm first, also when ZeRO has cut parameters into fragments.

    A group is left alone for its first `frozen_steps`: no decay, no moments, and bias correction counts from there.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: Train, clip: float, fused: bool) -> None:
        groups = [{"frozen_steps": 0, **group} for group in groups]
        super().__init__(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
        self.clip, self.fused, self.taken = clip, fused, 0
        self._owned: dict[int, list[tuple[int, int, int]]] = {}  # id(flat) -> (offset, numel, parameter number)
        self._count, self._sharded = 0, False

    def locate(self, fragments: Any, sharded: bool) -> None:
        self._owned, self._count, self._sharded = fragments.layout(), fragments.count, sharded

    def start(self, flat: Tensor, step: int) -> None:
        """Moments of zero, for a parameter that has been stepped so many times."""
        state = self.state[flat]
        state["step"] = torch.tensor(float(step), device=flat.device if self.fused else "cpu")
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(flat.data)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for flat in group["params"] if self.taken < group["frozen_steps"] else ():
                flat.grad = None
                if not self.state[flat]:  # so that it can be saved like any other
                    self.start(flat, 0)
        if self.clip > 0:
            flats = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            if self._sharded and flats:
                self._clip_fragments(flats)
            else:
                clip_per_parameter([p.grad for p in flats], self.clip)
        return super().step(closure)

    def _clip_fragments(self, flats: list[Tensor]) -> None:
        pieces = [
            (number, p.grad.view(-1).narrow(0, offset, numel))
            for p in flats
            if p.grad is not None
            for offset, numel, number in self._owned[id(p)]
        ]
        device = flats[0].device
        squares = torch.zeros(self._count, device=device)
        for number, grad in pieces:
            squares[number] += grad.float().square().sum()
        dist.all_reduce(squares)
        factors = (self.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for number, grad in pieces:
            grad.mul_(factors[number])
