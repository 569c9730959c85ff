"""A toy method outside Retort: the student's pooled feature is to equal a slow mean of its teachers'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.comm import Comm
from core.config import ConfigError
from core.data.views import View
from core.methods.base import Batch, Features, Info, Method, Report
from core.schedules import warmup_cosine


@dataclass
class ConstantOptions:
    pull: float = 0.1


class Model(nn.Module):
    def __init__(self, student: nn.Module, dim: int, out: int) -> None:
        super().__init__()
        self.student, self.head = student, nn.Linear(dim, out)

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.head(self.student(batch.views["crop"]))
        return out


class Constant(Method):
    Options = ConstantOptions
    teacher_view = "crop"

    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        if len({t.dim for t in teachers.values()}) != 1:
            raise ConfigError("teachers: constant needs teachers of one width")

    def views(self) -> list[View]:
        return [View(name="crop", size=self.settings.img_size, solarise=0.0)]

    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        self.centre = torch.zeros(next(iter(teachers.values())).dim)
        return Model(student, info.dim, len(self.centre))

    def targets(self, features: dict[str, Features], batch: Batch) -> Tensor:
        self.seen = torch.stack([f.cls.float().mean(0) for f in features.values()]).mean(0)
        return self.centre

    def losses(self, outputs: Tensor, targets: Tensor, batch: Batch) -> tuple[Tensor, Report]:
        loss = (outputs.float() - targets).square().mean()
        return loss, {"distance": loss.detach().sqrt()}

    def after_step(self, step: int, comm: Comm) -> Report:
        self.centre = self.centre + self.options.pull * (comm.mean(self.seen) - self.centre)
        return {"centre": self.centre.norm()}

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        named = list(module.named_parameters())
        return [{"params": [p for _, p in named], "names": [n for n, _ in named], "weight_decay": 0.0}]

    def schedules(self, step: int) -> dict[str, float]:
        return {"lr": warmup_cosine(step, base=self.settings.lr, final=0.0, steps=self.steps)}

    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.removeprefix("student."): v for k, v in weights.items() if k.startswith("student.")}

    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        return 2.0 * info.dim * next(iter(teachers.values())).dim

    def state(self) -> dict[str, Tensor]:
        return {"centre": self.centre}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.centre = state["centre"]


METHOD = Constant
