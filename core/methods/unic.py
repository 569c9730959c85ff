"""UNIC: one student imitates several frozen teachers on the class token and on every patch token.

Paper: arXiv 2408.05088. Teacher outputs are standardised per channel with running statistics; a ladder of projectors
on every student block predicts them; per image, teachers that are imitated well already are left out at random.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from core.comm import Comm
from core.config import ConfigError
from core.data.draws import uniform
from core.data.views import View
from core.losses import cosine_distance, drop_teachers, smooth_l1
from core.methods.base import Batch, Features, Info, Method, Report, check_widths
from core.models.heads import Ladder
from core.models.vit import forward_taps
from core.optim import decay_groups
from core.schedules import warmup_cosine
from core.stats import RunningStats, merge_moments, moments

TOKENS = ("cls", "patch")
BEHIND_TAPS = ("norm.", "fc_norm.", "attn_pool.", "head.")  # parts of a timm ViT that see the last block's output
DROP_DRAW = 1000  # key of the teacher-dropping draws, apart from those of the views
Tokens = dict[str, dict[str, Tensor]]  # teacher -> cls (B, D_t), patch (B, N, D_t)


@dataclass
class UnicOptions:
    """Defaults are those of the released code for UNIC-B."""

    hidden: int = 768  # of the ladder's projectors
    last_hidden: int = 3072  # of those on the last block
    prenorm: bool = False  # a LayerNorm in front of every projector
    midnorm: bool = False  # one between its two layers
    lambda_cos: float = 0.5
    lambda_sl1: float = 0.5
    drop: float = 0.5  # probability that a teacher other than the worst imitated one is left out
    momentum: tuple[float, float] = (1.0, 0.001)  # of the statistics, cosine over the stage
    scale: tuple[float, float] = (0.08, 1.0)  # of the random crops
    per_image: bool = False  # weigh images equally (the released comment) and not kept pairs (its arithmetic)


def unic_loss(
    student: Tokens, targets: Tokens, u_TB: Tensor, lambda_cos: float, lambda_sl1: float, p: float,
    per_image: bool = False,
) -> tuple[Tensor, Report]:  # fmt: skip
    """Loss over teachers with teacher dropping (released code, section 5 of the method notes).

    student, targets: teacher -> {cls (B, D_t), patch (B, N, D_t)}, targets standardised.  u_TB: uniform draws, rows in
    sorted teacher order.  Returns the scalar loss and the released log names; `loss_per_image` and `t_coeff` in the
    report are (T, B) and (T,).
    """
    report: Report = {}
    losses = []
    for teacher in sorted(targets):
        per_token = []
        for token in TOKENS:
            target = targets[teacher][token]
            pred = student[teacher][token].to(target.dtype)  # losses in fp32, whatever the student computes in
            terms = {"cos": cosine_distance(pred, target), "sl1": smooth_l1(pred, target)}
            terms = {k: v.mean(-1) if token == "patch" else v for k, v in terms.items()}  # (B,)
            per_token.append(lambda_cos * terms["cos"] + lambda_sl1 * terms["sl1"])
            report |= {f"loss/dist_{token}_{k}_{teacher}": v.detach().mean() for k, v in terms.items()}
            report[f"loss/dist_{token}_{teacher}"] = per_token[-1].detach().mean()
        losses.append((per_token[0] + per_token[1]) / 2)
        report[f"loss/dist_{teacher}"] = losses[-1].detach().mean()
    loss_TB = torch.stack(losses)
    loss, keep_TB = drop_teachers(loss_TB, u_TB, p)
    if per_image:
        loss = (loss_TB * keep_TB / keep_TB.sum(0, keepdim=True)).sum(0).mean()
    coeff_T = keep_TB.to(loss_TB.dtype).sum(1) / keep_TB.sum()
    report |= {f"t_coeff_{teacher}": coeff_T[i] for i, teacher in enumerate(sorted(targets))}
    report |= {"loss/dist": loss.detach(), "loss_per_image": loss_TB.detach(), "t_coeff": coeff_T}
    return loss, report


class UnicModel(nn.Module):
    """Student and ladder under the released names `encoder.*` and `lp.*`."""

    def __init__(self, student: nn.Module, lp: Ladder, prefix: int) -> None:
        super().__init__()
        self.encoder, self.lp, self.prefix = student, lp, prefix
        for name, parameter in student.named_parameters():
            if name.startswith(BEHIND_TAPS):
                parameter.requires_grad_(False)  # as the final norm, which stays weight 1, bias 0

    def external_parameters(self) -> list[nn.Parameter]:
        """Tokens and position table, read without calling the encoder's own forward."""
        return [p for p in self.encoder.parameters(recurse=False) if p.requires_grad]

    def forward(self, batch: Batch) -> Tokens:
        return cast(Tokens, self.lp(forward_taps(self.encoder, batch.views["image"]), self.prefix))


class Unic(Method):
    Options = UnicOptions
    per_parameter_clip = True
    options: UnicOptions

    def __init__(self, options: UnicOptions, settings: Any, steps: int) -> None:
        super().__init__(options, settings, steps)
        self.stats = nn.ModuleDict()
        self._pending: list[dict[str, Tensor]] = []  # moments (2, D_t) of this step's micro-batches
        self._counts: dict[str, int] = {}

    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        if not student.is_vit or not student.has_cls:
            raise ConfigError(
                f"student.name: unic taps every block and the class token of a ViT; {student.name} has "
                f"{'no class token' if student.is_vit else 'no plain ViT blocks'}"
            )
        for key, teacher in teachers.items():
            if teacher.grid != student.grid:
                raise ConfigError(
                    f"teachers.{key}.name: unic matches patch tokens one to one; {teacher.name} gives a grid of "
                    f"{teacher.grid} and the student {student.grid}"
                )
        check_widths(teachers)
        o = self.options
        if o.hidden < 1 or o.last_hidden < 1:
            raise ConfigError(f"method.options.hidden, last_hidden: must be above 0, got {o.hidden}, {o.last_hidden}")
        if not (0 <= o.drop <= 1 and 0 < o.scale[0] <= o.scale[1] <= 1):
            raise ConfigError(f"method.options.drop, scale: must lie in 0..1, got {o.drop}, {o.scale}")
        if o.drop and len(teachers) == 1:
            raise ConfigError(
                f"method.options.drop: {o.drop}, but {next(iter(teachers))} is the only teacher and always stays; "
                "set it to 0 or add a teacher"
            )
        if self.settings.lr == 0:
            raise ConfigError("train.lr: 0 would learn nothing")

    def views(self) -> list[View]:
        return [View(name="image", size=self.settings.img_size, scale=self.options.scale)]

    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        if not self.stats:  # once, however many modules are built
            self.stats.update({f"{t}/{token}": RunningStats(i.dim) for t, i in teachers.items() for token in TOKENS})
        return UnicModel(student, self._ladder(info, teachers), info.prefix)

    @torch.no_grad()
    def targets(self, features: dict[str, Features], batch: Batch) -> Tokens:
        """Standardised with the statistics as they were before this step; its own moments are kept for `after_step`."""
        pending: dict[str, Tensor] = {}
        out: Tokens = {}
        for name, feature in features.items():
            tokens = {"cls": feature.cls, "patch": feature.patch}
            out[name] = {token: self._stats(name, token)(z) for token, z in tokens.items()}
            if batch.training:
                pending |= {f"{name}/{token}": moments(z) for token, z in tokens.items()}
                self._counts |= {f"{name}/{token}": z.numel() // z.shape[-1] for token, z in tokens.items()}
        if batch.training:
            self._pending.append(pending)
        return out

    def losses(self, outputs: Tokens, targets: Tokens, batch: Batch) -> tuple[Tensor, Report]:
        o, u_TB = self.options, self.draws(batch, len(targets))
        device = next(iter(targets.values()))["cls"].device
        return unic_loss(
            outputs, targets, u_TB.to(device, non_blocking=True), o.lambda_cos, o.lambda_sl1, o.drop, o.per_image
        )

    def draws(self, batch: Batch, teachers: int) -> Tensor:
        """(T, B) uniform draws of teacher dropping, keyed by sample; in evaluation ones, so that nothing is dropped."""
        if not batch.training:
            return torch.ones(teachers, len(batch.index))
        u_BT = uniform(batch.seed, batch.epoch, batch.index.numpy(), DROP_DRAW, teachers)
        return torch.from_numpy(u_BT.T.copy())

    def after_step(self, step: int, comm: Comm) -> Report:
        """Statistics of the whole global batch, merged in canonical order, enter the running ones."""
        momentum = self.schedules(step)["tnorm_ema_momentum"]
        for key, stats in self.stats.items():
            parts = comm.gather(torch.stack([pending[key] for pending in self._pending]))  # (M, 2, D_t)
            mean, std = merge_moments(parts, self._counts[key])
            cast(RunningStats, stats).update(mean, std, momentum)
        self._pending = []
        return {}

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        return decay_groups(module.named_parameters(), self.settings.weight_decay)

    def schedules(self, step: int) -> dict[str, float]:
        s = self.settings
        start, end = self.options.momentum
        warmup = min(s.warmup_steps, self.steps)
        return {
            "lr": warmup_cosine(step, base=s.lr * s.lr_factor, final=s.min_lr, steps=self.steps, warmup=warmup),
            "tnorm_ema_momentum": warmup_cosine(step, base=start, final=end, steps=self.steps),
        }

    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        prefix = "encoder."
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        with torch.device("meta"):
            return float(self._ladder(info, teachers).flops(info.grid[0] * info.grid[1]))

    def to(self, device: torch.device) -> None:
        self.stats.to(device)

    def state(self) -> dict[str, Tensor]:
        return dict(self.stats.state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.stats.load_state_dict(state)

    def _ladder(self, info: Info, teachers: dict[str, Info]) -> Ladder:
        o, dims = self.options, {name: teacher.dim for name, teacher in teachers.items()}
        widths, norms = (o.hidden, o.last_hidden), (o.prenorm, o.midnorm)
        return Ladder(info.dim, dims, list(range(info.depth)), info.depth, *widths, *norms)

    def _stats(self, teacher: str, token: str) -> RunningStats:
        return cast(RunningStats, self.stats[f"{teacher}/{token}"])


METHOD = Unic
