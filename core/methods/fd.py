"""Feature-Distillation: a student regresses its frozen teacher's whitened tokens, to be fine-tuned afterwards.

Paper: arXiv 2205.14141. Every token of the teacher, after its own final norm, is standardised over its channels; one
linear layer on the student's normed tokens predicts it under a smooth-L1 loss. No labels, no pooling, no statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import ConfigError
from core.data.views import View
from core.methods.base import Batch, Features, Info, Method, Report, check_widths
from core.models.drop_path import use_sample_drop_path
from core.models.features import BEHIND_TOKENS
from core.models.fused import fuse_attention
from core.models.init import init_student
from core.optim_layers import bias_groups
from core.schedules import lagged_cosine

WHITEN_EPS = 1e-5


@dataclass
class FdOptions:
    """Defaults are those of the released 300-epoch configurations."""

    beta: float = 2.0  # error at which the loss turns from a parabola into a line
    whiten_eps: float = WHITEN_EPS  # added to the variance of a teacher's token
    scale: tuple[float, float] = (0.08, 1.0)  # of the random crops
    warmup_lr: float = 5e-7  # where the warm-up starts; scaled with the batch as train.lr and train.min_lr are
    tokens: str = "all"  # all: class token and patches | patch: patches only, for networks without a class token
    resize: bool = False  # fit the teacher's grid of tokens to the student's by bilinear interpolation
    init: str = "released"  # released: the student's initial weights as in the release | timm
    accumulation: int = 1  # iterations that the schedule counts per step, as the release does with accumulation
    leftover: int = 0  # iterations at the end of an epoch that the release then throws away


def whiten(tokens: Tensor, eps: float = WHITEN_EPS) -> Tensor:
    """(t - mean) / sqrt(var + eps) over the last axis, biased variance, no affine: (..., D) in float32 or wider."""
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return F.layer_norm(wide, wide.shape[-1:], eps=eps)


def fd_loss(pred: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    """Smooth-L1 averaged over images, tokens and channels: d^2 / (2 beta) below beta, |d| - beta / 2 above.

    pred: (B, N, D) in any precision.  target: (B, N, D) whitened, float32 or wider.
    """
    return F.smooth_l1_loss(pred.to(target.dtype), target, beta=beta)


def resize_tokens(patch_BND: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Patch tokens on another grid, bilinearly: (B, N, D) -> (B, N', D), row-major."""
    if old == new:
        return patch_BND
    image = patch_BND.mT.reshape(len(patch_BND), -1, *old).float()
    return F.interpolate(image, new, mode="bilinear", align_corners=False).flatten(2).mT.to(patch_BND.dtype)


class FdModel(nn.Module):
    """Student and one linear projector per teacher, under the released names `encoder.*` and `decoder.{i}.*`."""

    def __init__(self, student: nn.Module, dim: int, teacher_dims: list[int], skipped: tuple[int, int]) -> None:
        """skipped: the student's tokens in this range are not compared."""
        super().__init__()
        self.encoder, self.skipped = student, skipped
        self.decoder = nn.ModuleList(nn.Linear(dim, out) for out in teacher_dims)
        for name, parameter in student.named_parameters():
            if name.startswith(BEHIND_TOKENS):
                parameter.requires_grad_(False)

    def external_parameters(self) -> list[nn.Parameter]:
        """Tokens and position table, read without calling the encoder's own forward."""
        return [p for p in self.encoder.parameters(recurse=False) if p.requires_grad]

    def forward(self, batch: Batch) -> list[Tensor]:
        """Predictions (B, N, D_t), one per teacher."""
        tokens = tokens_of(self.encoder, batch.views["image"])
        first, last = self.skipped
        if first < last:
            tokens = torch.cat([tokens[:, :first], tokens[:, last:]], dim=1)
        return [project(tokens) for project in self.decoder]


def tokens_of(model: nn.Module, images: Tensor) -> Tensor:
    """All tokens after the final norm, (B, P + N, D); a Swin's map (B, h, w, D) row by row."""
    out: Tensor = model.forward_features(images)  # type: ignore[operator]
    return out.flatten(1, 2) if out.ndim == 4 else out


class Fd(Method):
    Options = FdOptions
    options: FdOptions

    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        o = self.options
        if o.tokens not in ("all", "patch") or o.init not in ("released", "timm"):
            raise ConfigError(
                f"method.options: tokens is all or patch, init released or timm; got {o.tokens}, {o.init}"
            )
        positive = min(o.whiten_eps, o.beta, o.accumulation) > 0
        if not (positive and 0 < o.scale[0] <= o.scale[1] <= 1 and o.leftover >= 0):
            raise ConfigError(
                f"method.options: whiten_eps, beta and accumulation must be above 0 and scale within 0..1, got "
                f"{o.whiten_eps}, {o.beta}, {o.accumulation}, {o.scale}"
            )
        if self.settings.lr <= 0:
            raise ConfigError("train.lr: 0 would learn nothing")
        check_widths(teachers)
        for info in (student, *teachers.values()):
            if 0 in info.grid:
                raise ConfigError(f"fd compares tokens on a grid, and {info.name} gives none; use a ViT or a Swin")
        for key, teacher in teachers.items():
            if teacher.grid != student.grid and not o.resize:
                raise ConfigError(
                    f"teachers.{key}: {teacher.name} has {_shape(teacher)} tokens and the student {student.name} "
                    f"{_shape(student)}; take a student with the same grid or set method.options.resize=true"
                )
            if o.tokens == "all" and teacher.has_cls != student.has_cls:
                without = student.name if teacher.has_cls else teacher.name
                raise ConfigError(f"teachers.{key}: {without} has no class token; set method.options.tokens=patch")

    def views(self) -> list[View]:
        return [View(size=self.settings.img_size, scale=self.options.scale, interpolation="bilinear",
                     jitter=0.0, gray=0.0, blur=0.0, solarise=0.0)]  # fmt: skip

    def initialise(self, student: nn.Module) -> None:
        if self.options.init == "released":
            init_student(student)

    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        use_sample_drop_path(student)
        fuse_attention(student)
        self._grids = {name: teacher.grid for name, teacher in teachers.items()}
        self._grid = info.grid
        self._with_cls = self.options.tokens == "all" and info.has_cls
        return FdModel(student, info.dim, [teachers[name].dim for name in sorted(teachers)],
                       (int(self._with_cls), info.prefix))  # fmt: skip

    def reads(self) -> tuple[str, ...]:
        return ("cls", "patch") if self.options.tokens == "all" else ("patch",)

    @torch.no_grad()
    def targets(self, features: dict[str, Features], batch: Batch) -> list[Tensor]:
        """Whitened tokens (B, N, D_t) of every teacher, in sorted order of their names."""
        out = []
        for name in sorted(features):
            tokens = resize_tokens(features[name].patch, self._grids[name], self._grid)
            if self._with_cls:
                tokens = torch.cat([_class_token(name, features[name]), tokens], dim=1)
            out.append(whiten(tokens, self.options.whiten_eps))
        return out

    def losses(self, outputs: list[Tensor], targets: list[Tensor], batch: Batch) -> tuple[Tensor, Report]:
        """Mean over teachers. `loss/zero` is what predicting constants gives: a curve that stays there has failed."""
        per_teacher = torch.stack(
            [fd_loss(pred, target, self.options.beta) for pred, target in zip(outputs, targets, strict=True)]
        )
        report = {f"loss/{name}": loss for name, loss in zip(sorted(self._grids), per_teacher.detach(), strict=True)}
        with torch.no_grad():
            zero = [fd_loss(torch.zeros_like(target), target, self.options.beta) for target in targets]
        return per_teacher.mean(), report | {"loss/zero": torch.stack(zero).mean()}

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        return bias_groups(module.named_parameters(), self.settings.weight_decay)

    def schedules(self, step: int) -> dict[str, float]:
        s, o = self.settings, self.options
        scale = s.batch / s.lr_batch if s.lr_batch else 1.0
        lr = lagged_cosine(self._iterations(step - 1) + o.accumulation - 1 if step else -1, base=s.lr * scale,
                           final=s.min_lr * scale, start=o.warmup_lr * scale, steps=self._iterations(self.steps),
                           warmup=self._iterations(min(s.warmup_steps, self.steps - 1)))  # fmt: skip
        return {"lr": lr}

    def _iterations(self, step: int) -> int:
        """Of the schedule, before this step."""
        return step * self.options.accumulation + step // self.epoch_steps * self.options.leftover

    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = "encoder."
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        tokens = info.grid[0] * info.grid[1] + int(self.options.tokens == "all" and info.has_cls)
        return float(sum(2 * tokens * info.dim * teacher.dim for teacher in teachers.values()))


def _class_token(name: str, feature: Features) -> Tensor:
    """(B, 1, D).  Raises ConfigError where the recipe takes another class feature, of another width."""
    if feature.cls.shape[-1] != feature.patch.shape[-1]:
        raise ConfigError(f"teachers.{name}.cls: fd compares tokens and no projections; use teachers.{name}.cls=token")
    return feature.cls.unsqueeze(1)


def _shape(info: Info) -> str:
    return f"{info.grid[0]}x{info.grid[1]}"


METHOD = Fd
