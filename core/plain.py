"""The same step in plain PyTorch, one process per rank: the baseline of `make bench` and the float64 reference of the
golden cases. Runs never use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from core.comm import Comm
from core.engine import Rate
from core.fragments import Fragment
from core.methods.base import Batch
from core.optim import clip_per_parameter
from core.recipe import Train


class PlainEngine:
    """forward, backward and step as `core.engine.Engine` has them, with gradients averaged by one all-reduce."""

    def __init__(
        self, module: nn.Module, groups: list[dict[str, Any]], settings: Train, comm: Comm, per_parameter_clip: bool
    ) -> None:
        self.module, self.comm, self.clip, self.per_parameter_clip = module, comm, settings.clip, per_parameter_clip
        self.device, self.bf16 = comm.device, settings.precision == "bf16"
        self.scales = [group.get("lr_scale", 1.0) for group in groups]
        self.decays = [group["weight_decay"] > 0 for group in groups]
        groups = [{"frozen_steps": 0, **group} for group in groups]
        self.adam, self.taken = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps), 0
        self.accumulation = settings.batch // settings.micro_batch // comm.world
        self.parameters = [p for group in groups for p in group["params"]]
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad}
        self.replicated = True

    def fragments(self) -> list[Fragment]:
        """All weights, as `core.engine.Engine.fragments` has them."""
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return [Fragment(name, 0, p.numel(), lambda kind, p=p: p.data.view(-1)) for name, p in named]  # type: ignore[misc]

    def train(self, on: bool) -> None:
        self.module.train(on)

    def forward(self, batch: Batch) -> Any:
        with torch.autocast(self.comm.device.type, torch.bfloat16, enabled=self.bf16):
            return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()  # type: ignore[no-untyped-call]

    def step(self, lr: Rate, weight_decay: float | None = None) -> None:
        if self.comm.world > 1:
            flat = self.comm.mean(torch.cat([_grad(p).flatten() for p in self.parameters]))
            for p, grad in zip(self.parameters, torch.split(flat, [p.numel() for p in self.parameters]), strict=True):
                p.grad = grad.view_as(p)
        for group in self.adam.param_groups:
            for p in group["params"] if self.taken < group["frozen_steps"] else ():
                p.grad = None
        if self.clip > 0 and self.per_parameter_clip:
            clip_per_parameter([p.grad for p in self.parameters], self.clip)
        elif self.clip > 0:
            nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for group, scale, decays in zip(self.adam.param_groups, self.scales, self.decays, strict=True):
            group["lr"] = lr(scale)
            if weight_decay is not None and decays:
                group["weight_decay"] = weight_decay
        self.adam.step()
        self.adam.zero_grad()
        self.taken += 1


def _grad(parameter: nn.Parameter) -> Tensor:
    """A parameter that this step's loss does not reach counts as zero, as with ZeRO."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
