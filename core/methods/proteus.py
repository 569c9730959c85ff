"""Proteus: a student trained from scratch regresses a frozen foundation model's last features on unlabelled images.

Paper: arXiv 2407.10366 (ICLR 2025). Squared errors on the class token, on all tokens, and on patches that are masked
in the student's input but not in the teacher's. Nothing is normalised, nothing is scheduled but the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from core.comm import Comm
from core.config import ConfigError, nearest
from core.data.colour import to_device
from core.data.draws import uniform
from core.data.masks import (
    Masks,
    check_masking,
    mask_counts,
    masked_samples,
    place_masks,
    ratio_bins,
    round_to_half,
    smallest,
)
from core.data.views import View
from core.ema import PREFIX, Average
from core.losses import cosine_distance, smooth_l1, squared_error
from core.methods.base import Batch, Features, Info, Method, Report, check_widths
from core.models.adapters import Adapter, MaskedStudent
from core.optim import decay_groups
from core.schedules import late_epoch, unshifted_cosine

if TYPE_CHECKING:
    from core.engine import Engine

MASK_DRAW = 1001  # key of the mask draws, apart from those of the views
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": squared_error, "cosine": cosine_distance, "smooth_l1": smooth_l1,
}  # fmt: skip
Tokens = dict[str, dict[str, Tensor]]  # teacher -> kind of token -> (..., D_t)


@dataclass
class ProteusOptions:
    """Defaults are those of the released script for Proteus-B."""

    lambda_token: float = 1.0
    lambda_feature: float = 1.0
    lambda_patch: float = 1.0
    distance: str = "mse"  # mse | cosine | smooth_l1
    mask_probability: float = 0.5  # share of a micro-batch that is masked
    mask_ratio: list[float] = field(default_factory=lambda: [0.5])  # share of patches, or the ends of a range
    mask_first: bool = True  # the first samples of a micro-batch, not random ones
    mask_std: float = 0.0  # of the initial mask token: 0 (DINOv2 towers), 0.02 (SynCLR)
    half_images: bool = True  # pixels rounded to fp16 before anything else, as released
    schedule: str = "epoch"  # epoch: as released, one epoch late and constant within | step: every step
    warmup_lr: float = 1e-6
    undecayed: list[str] = field(default_factory=list)  # names free of weight decay beside biases and vectors
    ema: float = 0.0  # decay of an average of the weights, 0 = none; 0.99996 in the release, which exports the weights
    export_average: bool = False
    rand_augment: str = "rand-m9-mstd0.5-inc1"  # timm's notation; "" = off
    erase: float = 0.25
    scale: tuple[float, float] = (0.08, 1.0)  # of the random crops


def proteus_loss(
    student: Tokens, targets: Tokens, lambdas: tuple[float, float, float], distance: str = "mse"
) -> tuple[Tensor, Report]:
    """lambda_token L_token + lambda_feature L_feature + lambda_patch L_patch, averaged over teachers (section 5).

    L_token: class tokens (B, D_t). L_feature: class token and the N patch tokens (B, N, D_t) together, so that the
    class token counts once more with 1 / (1 + N). L_patch: masked patches (K, D_t). Each is the mean over all elements;
    a term of weight 0 is left out, and so is L_patch in a micro-batch without masks.

    student, targets: teacher -> {token, feature, patch}, those kinds that a term of other weight than 0 needs.
    The report has each term times its lambda, as the release logs it; of weight 0 it is 0.
    """
    report: Report = {}
    total = []
    for teacher, target in sorted(targets.items()):
        error = {kind: DISTANCES[distance](student[teacher][kind], target[kind]) for kind in target}
        terms = {"token": error["token"].mean()} if "token" in error else {}
        if lambdas[1]:
            places = target["feature"].shape[1]
            terms["feature"] = (terms["token"] + places * error["feature"].mean()) / (1 + places)
        if lambdas[2]:
            terms["patch"] = error["patch"].mean() if error["patch"].numel() else error["patch"].sum()
        weights = dict(zip(("token", "feature", "patch"), lambdas, strict=True))
        terms = {kind: weights[kind] * term for kind, term in terms.items() if weights[kind]}
        total.append(torch.stack([*terms.values()]).sum())
        absent = total[-1].new_zeros(())
        report |= {f"loss/{kind}_{teacher}": terms.get(kind, absent).detach() for kind in weights}
    loss = torch.stack(total).mean()
    return loss, report | {"loss/dist": loss.detach()}


class Proteus(Method):
    Options = ProteusOptions
    options: ProteusOptions

    def __init__(self, options: ProteusOptions, settings: Any, steps: int) -> None:
        super().__init__(options, settings, steps)
        self._average: Average | None = None
        self._embedding = 0.0  # FLOPs of the patch embedding, which both passes share

    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        o = self.options
        if not student.is_vit or not student.has_cls:
            raise ConfigError(
                f"student.name: proteus matches class and patch tokens of a plain ViT; {student.name} has "
                f"{'no class token' if student.is_vit else 'no plain ViT blocks'}"
            )
        check_widths(teachers)
        for name, teacher in teachers.items():
            if teacher.grid != student.grid:
                raise ConfigError(
                    f"teachers.{name}: a grid of {teacher.grid} patches and the student's of {student.grid} cannot be "
                    "matched token by token"
                )
        self._places = student.grid[0] * student.grid[1]
        self._embedding = 2.0 * self._places * 3 * student.patch**2 * student.dim
        if min(self._lambdas) < 0 or not any(self._lambdas):
            raise ConfigError(
                "method.options.lambda_token, lambda_feature, lambda_patch: must not be negative nor all 0, got "
                f"{self._lambdas}"
            )
        for key, value, known in (("distance", o.distance, [*DISTANCES]), ("schedule", o.schedule, ["epoch", "step"])):
            if value not in known:
                raise ConfigError(
                    f"method.options.{key}: {value!r} is not one of {', '.join(known)}{nearest(value, known)}"
                )
        if not 0 < o.scale[0] <= o.scale[1] <= 1 or not 0 <= o.erase <= 1 or o.mask_std < 0 or o.warmup_lr < 0:
            raise ConfigError(
                f"method.options.scale, erase: must lie in 0..1, mask_std, warmup_lr not be negative, got {o.scale}, "
                f"{o.erase}, {o.mask_std}, {o.warmup_lr}"
            )
        if not 0 <= o.ema < 1 or (o.export_average and not o.ema):
            raise ConfigError(f"method.options.ema: must be in [0, 1), and above 0 to export the average, got {o.ema}")
        if o.lambda_patch:
            check_masking(o.mask_probability, o.mask_ratio, student.grid[0] * student.grid[1], "method.options")
            if not masked_samples(self.settings.micro_batch, o.mask_probability):
                raise ConfigError(
                    f"train.micro_batch: of {self.settings.micro_batch} samples a share of {o.mask_probability} is "
                    "none: use a larger micro-batch, or set method.options.mask_probability higher"
                )

    def views(self) -> list[View]:
        o = self.options
        return [View(name="image", size=self.settings.img_size, scale=o.scale, jitter=0.0, gray=0.0, blur=0.0,
                     solarise=0.0, rand_augment=o.rand_augment, erase=o.erase)]  # fmt: skip

    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        self._places = info.grid[0] * info.grid[1]
        dims = {name: teacher.dim for name, teacher in teachers.items()}
        return MaskedStudent(student, info.dim, dims, self._kinds, self.options.mask_std)

    def prepare(self, batch: Batch) -> Batch:
        """Pixels rounded; masks of the micro-batch, and where its masked patches are in B * N (`mask_index`)."""
        if self.options.half_images:
            batch = replace(batch, views={name: round_to_half(x) for name, x in batch.views.items()})
        if not self.options.lambda_patch:
            return batch
        return replace(batch, extra=batch.extra | mask_tensors(self.masks(batch), batch.views["image"].device))

    def reads(self) -> tuple[str, ...]:
        return (*(["cls"] if "token" in self._kinds else []), *(["patch"] if self._kinds != ["token"] else []))

    def pixels(self) -> dict[str, Any]:
        return {"half": self.options.half_images}

    def masks(self, batch: Batch) -> Masks:
        """Drawn by sample; on held-out images every sample is masked by the mean ratio, whatever batch it is in."""
        o, count, places = self.options, len(batch.index), self._places
        draws = uniform(batch.seed, batch.epoch, batch.index.numpy(), MASK_DRAW, places + 2)
        if not batch.training:
            ratio = [float(np.mean(o.mask_ratio))]
            return place_masks(smallest(draws[:, :places], mask_counts(count, places, ratio)), count)
        n = masked_samples(count, o.mask_probability)
        edges = ratio_bins(n, o.mask_ratio)
        u_n = edges[:-1] + draws[:n, places] * np.diff(edges)
        marked = smallest(draws[:n, :places], mask_counts(n, places, o.mask_ratio, u_n))
        return place_masks(marked, count, None if o.mask_first else draws[:, places + 1].argsort(kind="stable"))

    @torch.no_grad()
    def targets(self, features: dict[str, Features], batch: Batch) -> Tokens:
        out: Tokens = {}
        for name, feature in features.items():
            out[name] = {"token": feature.cls} if "token" in self._kinds else {}
            if "feature" in self._kinds:
                out[name]["feature"] = feature.patch
            if "patch" in self._kinds:
                out[name]["patch"] = feature.patch.flatten(0, 1).index_select(0, batch.extra["mask_index"])
        return out

    def losses(self, outputs: Tokens, targets: Tokens, batch: Batch) -> tuple[Tensor, Report]:
        return proteus_loss(outputs, targets, self._lambdas, self.options.distance)

    def attach(self, engine: Engine, rebuild: Callable[[], nn.Module]) -> None:
        if self.options.ema:
            self._average = Average(rebuild(), engine, torch.float32)

    def after_step(self, step: int, comm: Comm) -> Report:
        if self._average is not None:
            self._average.update(self.options.ema)
        return {}

    def state(self) -> dict[str, Tensor]:
        return self._average.state() if self._average is not None else {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self._average is not None:
            self._average.load_state(state)

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        return decay_groups(module.named_parameters(), self.settings.weight_decay, self.options.undecayed)

    def schedules(self, step: int) -> dict[str, float]:
        s, o = self.settings, self.options
        warmup: float = min(s.warmup_steps, self.steps)
        at, length = step, self.steps
        if o.schedule == "epoch":
            at, length, warmup = late_epoch(step * s.epochs // length), s.epochs, warmup * s.epochs / length
        base, start = s.lr * s.lr_factor, o.warmup_lr
        lr = unshifted_cosine(at, base=base, final=s.min_lr, start=start, steps=length, warmup=warmup)
        return {"lr": lr}

    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        weights, prefix = (state, f"{PREFIX}student.") if self.options.export_average else (weights, "student.")
        return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}

    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        places, share = info.grid[0] * info.grid[1], float(np.mean(self.options.mask_ratio)) * self._masked_share
        tokens = {"token": 1.0, "feature": float(places), "patch": share * places}
        each = sum(Adapter.flops(info.dim, teacher.dim) for teacher in teachers.values())
        return each * sum(tokens[kind] for kind in self._kinds)

    def student_flops(self, forward: Callable[[int], float]) -> tuple[float, float]:
        once = forward(self.settings.img_size)
        return once + self._masked_share * (once - self._embedding), 0.0

    @property
    def _lambdas(self) -> tuple[float, float, float]:
        o = self.options
        return o.lambda_token, o.lambda_feature, o.lambda_patch

    @property
    def _kinds(self) -> list[str]:
        """Heads that the loss reads; the feature term holds the class token too."""
        token, feature, patch = self._lambdas
        return [kind for kind, weight in (("token", token + feature), ("feature", feature), ("patch", patch)) if weight]

    @property
    def _masked_share(self) -> float:
        micro = self.settings.micro_batch
        return masked_samples(micro, self.options.mask_probability) / micro if self.options.lambda_patch else 0.0


def mask_tensors(masks: Masks, device: torch.device) -> dict[str, Tensor]:
    """What student and targets need of masks, on the device: mask (n, N) of the masked samples, mask_rows (n,) which
    they are, mask_at (K,) masked positions in n * N, mask_index (K,) the same positions in B * N."""
    rows = np.flatnonzero(masks.masks.any(1))
    own = masks.masks[rows]
    arrays = {"mask": own, "mask_rows": rows, "mask_at": np.flatnonzero(own), "mask_index": masks.index}
    return {name: to_device(array, device) for name, array in arrays.items()}


METHOD = Proteus
