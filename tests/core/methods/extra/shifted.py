"""A method that exists for the tests alone: any backbone learns a shifted class feature of one teacher.

It uses what the contract offers and UNIC does not: a student that is no ViT, two views, clipping of the global norm,
a schedule of weight decay, a rate of its own for the head, raw teacher features in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.comm import Comm
from core.data.views import View
from core.methods.base import Batch, Features, Info, Method, Report


@dataclass
class ShiftedOptions:
    shift: float = 1.0
    betas: tuple[float, float] = (0.5, 0.5)


class ShiftedModel(nn.Module):
    def __init__(self, student: nn.Module, dim: int, out: int) -> None:
        super().__init__()
        self.student, self.head = student, nn.Linear(dim, out, bias=False)

    def forward(self, batch: Batch) -> list[Tensor]:
        return [self.head(self.student(batch.views[name])) for name in ("image", "other")]


class Shifted(Method):
    Options = ShiftedOptions
    options: ShiftedOptions
    teacher_view = "other"

    def __init__(self, options: ShiftedOptions, settings: Any, steps: int) -> None:
        super().__init__(options, settings, steps)
        self.mean, self.pending = torch.zeros(()), torch.zeros(())

    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        pass

    def views(self) -> list[View]:
        size = self.settings.img_size
        return [View(name="image", size=size), View(name="other", size=size, flip=0.0)]

    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        return ShiftedModel(student, info.dim, next(iter(teachers.values())).dim)

    def targets(self, features: dict[str, Features], batch: Batch) -> Tensor:
        return next(iter(features.values())).cls

    def losses(self, outputs: list[Tensor], targets: Tensor, batch: Batch) -> tuple[Tensor, Report]:
        loss = sum(F.mse_loss(out.float() - self.options.shift, targets) for out in outputs)
        if batch.training:
            self.pending += loss.detach() / (self.settings.batch // self.settings.micro_batch)
        return loss, {"other": outputs[1].detach().float().mean()}

    def after_step(self, step: int, comm: Comm) -> Report:
        self.mean = 0.5 * self.mean + 0.5 * comm.sum(self.pending)
        self.pending = torch.zeros_like(self.pending)
        return {"mean": self.mean}

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        parts = {"student.": 1.0, "head.": 10.0}
        named = [(n, p) for n, p in module.named_parameters()]
        return [
            {"params": [p for n, p in named if n.startswith(part)], "weight_decay": self.settings.weight_decay,
             "names": [n for n, _ in named if n.startswith(part)], "lr_scale": scale}
            for part, scale in parts.items()
        ]  # fmt: skip

    def schedules(self, step: int) -> dict[str, float]:
        return {"lr": self.settings.lr, "weight_decay": self.settings.weight_decay * step / self.steps}

    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")}

    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        return 2.0 * 2 * info.dim * next(iter(teachers.values())).dim

    def to(self, device: torch.device) -> None:
        self.mean, self.pending = self.mean.to(device), self.pending.to(device)

    def state(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.mean = state["mean"].to(self.mean.device)


METHOD = Shifted
