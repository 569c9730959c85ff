"""Supervised fine-tuning as Feature-Distillation's second stage: layer-wise learning rates, mixed and smoothed labels.

Paper: arXiv 2205.14141, section 7 of the method notes. Patch tokens are averaged, normed and classified; a bias table
that the blocks shared becomes a table of each block.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from core.config import ConfigError
from core.data.draws import uniform
from core.data.mix import DRAWS, Mix, draw_mix, mix_images, mix_labels
from core.data.views import View
from core.losses import soft_cross_entropy
from core.methods.base import Batch, Features, Info, Method, Report
from core.models.drop_path import use_sample_drop_path
from core.models.fused import fuse_attention
from core.models.init import init_head, init_student
from core.models.rel_pos import CLS_ROWS, resize_table
from core.optim_layers import layer_groups
from core.schedules import lagged_cosine

MIX_DRAW = -3000  # key of the mixing draws, apart from those of the views
ENCODER = "encoder."
SHARED, OWN = "rel_pos_bias.relative_position_bias_table", ".attn.relative_position_bias_table"
NEW = ("fc_norm.", "head.")  # what no earlier stage can have
MOST_ALPHA = 2.0


@dataclass
class FinetuneOptions:
    """Defaults are those of the released fine-tuning of CLIP ViT-B/16 after 300 epochs."""

    num_classes: int = 1000
    layer_decay: float = 0.6
    warmup_lr: float = 2.5e-7  # the same for all layers, as train.min_lr is; both scaled with the batch
    mixup: float = 0.8  # alphas; 0 = off
    cutmix: float = 1.0
    switch: float = 0.5  # probability of CutMix where both are on
    smoothing: float = 0.1
    scale: tuple[float, float] = (0.08, 1.0)  # of the random crops
    rand_augment: str = "rand-m9-mstd0.5-inc1"  # timm's notation; "" = off
    erase: float = 0.25  # probability of random erasing
    init: str = "released"  # of weights that no stage before gives: released | timm


def own_tables(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a distilled student for the network `own`: what is in both, the shared table copied to every block.

    state, own: timm's keys.  Tables of another grid are resized. The distilled final norm is left out where `own` norms
    after pooling.
    """
    given = dict(state)
    if SHARED in given and SHARED not in own:
        table = given.pop(SHARED)
        given |= {name: table for name in own if name.endswith(OWN)}
    for name in given.keys() & own.keys():
        if name.endswith("relative_position_bias_table") and given[name].shape != own[name].shape:
            given[name] = resize_table(given[name], _grid(given[name]), _grid(own[name]))
    return {name: given[name] for name in own if name in given}


def _grid(table_RH: Tensor) -> tuple[int, int]:
    """Of a table with rows for the class token or without: places are odd squares, and never 3 apart."""
    places = len(table_RH)
    places -= CLS_ROWS if math.isqrt(places) ** 2 != places else 0
    side = (math.isqrt(places) + 1) // 2
    return side, side


def _is_new(name: str) -> bool:
    return name.removeprefix(ENCODER).startswith(NEW)


class Classifier(nn.Module):
    """A headless timm model and a linear head on its pooled feature."""

    def __init__(self, encoder: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(dim, num_classes)
        init_head(self.head)

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C)."""
        logits: Tensor = self.head(self.encoder(batch.views["image"]))
        return logits


class Finetune(Method):
    Options = FinetuneOptions
    needs_teachers = False
    needs_labels = True
    options: FinetuneOptions

    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        o = self.options
        if o.num_classes < 2 or not 0 < o.layer_decay <= 1:
            raise ConfigError(
                f"method.options: num_classes must be above 1 and layer_decay in 0..1, got {o.num_classes}, "
                f"{o.layer_decay}"
            )
        if not all(0 <= p <= 1 for p in (o.switch, o.smoothing, o.erase)):
            raise ConfigError(
                f"method.options.switch, smoothing, erase: must lie in 0..1, got {o.switch}, {o.smoothing}, {o.erase}"
            )
        if not all(0 <= alpha <= MOST_ALPHA for alpha in (o.mixup, o.cutmix)):
            raise ConfigError(f"method.options.mixup, cutmix: must lie in 0..{MOST_ALPHA:g}, got {o.mixup}, {o.cutmix}")
        if (o.mixup or o.cutmix) and self.settings.micro_batch % 2:
            raise ConfigError(
                f"train.micro_batch: images are mixed in pairs within a micro-batch of {self.settings.micro_batch}; "
                "take an even number, or method.options.mixup=0 and cutmix=0"
            )
        if student.projection:
            raise ConfigError("student.args.projection: fine-tuning puts its own head on the pooled feature; remove it")
        if o.init not in ("released", "timm"):
            raise ConfigError(f"method.options.init: released or timm, got {o.init}")

    def check_labels(self, classes: int, field: str) -> None:
        super().check_labels(classes, field)
        if classes > self.options.num_classes:
            raise ConfigError(
                f"method.options.num_classes: {self.options.num_classes}, but {field} has {classes} classes"
            )

    def views(self) -> list[View]:
        o = self.options
        return [View(size=self.settings.img_size, scale=o.scale, rand_augment=o.rand_augment, erase=o.erase,
                     jitter=0.0, gray=0.0, blur=0.0, solarise=0.0)]  # fmt: skip

    def initialise(self, student: nn.Module) -> None:
        if self.options.init == "released":
            init_student(student, bound=2.0)

    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        use_sample_drop_path(student)
        fuse_attention(student)
        module = Classifier(student, info.dim, self.options.num_classes)
        self._own = {name: value.detach().clone() if _is_new(name) else value.to("meta")
                     for name, value in module.state_dict().items()}  # fmt: skip
        return module

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A distilled student's weights and the fresh head, or an earlier fine-tuning stage's weights."""
        student = {k.removeprefix(ENCODER): v for k, v in weights.items() if k.startswith(ENCODER)}
        own = {k.removeprefix(ENCODER): v for k, v in self._own.items() if k.startswith(ENCODER)}
        taken = {ENCODER + k: v for k, v in own_tables(student, own).items()}
        taken |= {k: v for k, v in weights.items() if k.startswith("head.")}
        return {k: v for k, v in self._own.items() if _is_new(k)} | taken

    def prepare(self, batch: Batch) -> Batch:
        """Mixes images and labels; `extra` gets the soft targets (B, C). In evaluation labels are as they are."""
        assert batch.labels is not None
        o, images = self.options, batch.views["image"]
        mix, smoothing = Mix(1.0), 0.0
        if batch.training:
            u = uniform(batch.seed, batch.epoch, batch.index[:1].numpy(), MIX_DRAW, DRAWS)[0]
            size = (images.shape[-2], images.shape[-1])
            mix, smoothing = draw_mix(u, size, o.mixup, o.cutmix, o.switch), o.smoothing
        targets = mix_labels(batch.labels.clamp(min=0), o.num_classes, mix.share, smoothing)
        return dataclasses.replace(
            batch, views={"image": mix_images(images, mix)}, extra=batch.extra | {"soft_targets": targets}
        )

    def targets(self, features: dict[str, Features], batch: Batch) -> Tensor:
        return batch.extra["soft_targets"]

    def losses(self, outputs: Tensor, targets: Tensor, batch: Batch) -> tuple[Tensor, Report]:
        hits = (outputs.detach().argmax(-1) == targets.argmax(-1)).float().mean()
        return soft_cross_entropy(outputs, targets), {"top1": 100.0 * hits}

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        s = self.settings
        return layer_groups(module.named_parameters(), s.weight_decay, self.options.layer_decay, ENCODER)

    def schedules(self, step: int) -> dict[str, float]:
        return {"lr": self.lr(step, 1.0)}

    def lr(self, step: int, scale: float) -> float:
        """The layer's factor scales the peak alone: warm-up and minimum are the same for all layers."""
        s, o = self.settings, self.options
        batch = s.batch / s.lr_batch if s.lr_batch else 1.0
        return lagged_cosine(step - 1, base=s.lr * batch * scale, final=s.min_lr * batch, start=o.warmup_lr * batch,
                             steps=self.steps, warmup=min(s.warmup_steps, self.steps - 1))  # fmt: skip

    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.removeprefix(ENCODER): v for k, v in weights.items() if k.startswith(ENCODER)}

    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        return 2.0 * info.dim * self.options.num_classes


METHOD = Finetune
