"""DIME-FM: a small image tower learns the score geometry of a large CLIP from images and unrelated sentences.

Paper: arXiv 2303.18232. Cosine scores of the student's images with the teacher's sentences and images follow those of
the teacher's own images, over the whole global batch. Teacher vectors are stored, in tables or by `make features`: only
the student runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.config import ConfigError
from core.data.features import IMAGE, TEXT, Beside, check_width
from core.data.loader import Companion
from core.data.views import View
from core.losses_pairs import Weights, score_losses, vector_distance
from core.methods.base import Batch, Features, Info, Method, Report, Vectors
from core.models.clip import init_clip
from core.optim import decay_groups
from core.schedules import unshifted_cosine

NO_DECAY = ("cls_token", "pos_embed", "relative_position_bias_table", "absolute_pos_embed")  # beside 1-D and biases
ENCODER = "encoder."
Targets = dict[str, Tensor]


@dataclass
class DimeFmOptions:
    """Defaults are those of the released code; `udist` counts with its weight, 0.1 in the recipe that has it."""

    vl: float = 0.7  # weight of image-sentence scores
    pvl: float = 0.3  # of scores with the teacher's images in the place of sentences; 0 leaves the term out
    udist: float = 0.0  # of scores among the student's images; 0 leaves the term out
    vector: float = 0.0  # of the squared distance to the teacher's unit vector
    t_vl: float = 1.0  # temperatures
    t_pvl: float = 3.0
    t_udist: float = 7.0
    warmup_lr: float = 4e-6  # at which the warm-up starts
    scale: tuple[float, float] = (0.08, 1.0)  # of the random crops
    resize: int = 256  # short side before the crop, in pixels; 0 crops the image as it is
    online: bool = False  # the recipe's teacher sees the student's crops, instead of stored vectors of whole images
    init: str = "released"  # released: initial weights of CLIP's towers | timm


def late_step(step: int) -> int:
    """Step whose learning rate an optimiser step has: the schedule moves after it, so 0 and 1 share a rate."""
    return max(step - 1, 0)


def groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decayed and other parameters: tokens, position tables, biases and what is one-dimensional are not decayed."""
    return decay_groups(module.named_parameters(), weight_decay, NO_DECAY)


class DimeFmModel(nn.Module):
    """The student alone: images to vectors (B, E) in the space of the teacher's sentences."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.encoder = student

    def forward(self, batch: Batch) -> Tensor:
        out: Tensor = self.encoder(batch.views["image"])
        return out


class DimeFm(Method):
    Options = DimeFmOptions
    couples_batch = True
    options: DimeFmOptions

    @classmethod
    def uses_teachers(cls, options: dict[str, Any]) -> bool:
        return bool(options.get("online", DimeFmOptions.online))

    @classmethod
    def reads_vectors(cls, options: dict[str, Any]) -> tuple[Vectors, ...]:
        return ("texts",) if cls.uses_teachers(options) else ("images", "texts")

    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        o = self.options
        if not student.projection:
            raise ConfigError(
                f"student.args.num_classes: {student.name} gives no vector in the teacher's space; set its width, 768 "
                "for CLIP ViT-L/14"
            )
        weights = {"vl": o.vl, "pvl": o.pvl, "udist": o.udist, "vector": o.vector}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ConfigError(f"method.options: weights must not be negative nor all zero, got {weights}")
        if min(o.t_vl, o.t_pvl, o.t_udist) <= 0:
            raise ConfigError(f"method.options.t_*: temperatures must be above 0, got {o.t_vl}, {o.t_pvl}, {o.t_udist}")
        if not 0 < o.scale[0] <= o.scale[1] <= 1 or o.resize < 0 or o.init not in ("released", "timm"):
            raise ConfigError(
                f"method.options: scale must lie in 0..1, resize not below 0, init be released or timm; got {o.scale}, "
                f"{o.resize}, {o.init}"
            )
        if self.settings.batch < 2:
            raise ConfigError("train.batch: scores of a single image compare nothing; use at least 2")
        if o.online and len(teachers) != 1:
            raise ConfigError(f"teachers: method.options.online takes one teacher, the recipe has {len(teachers)}")
        self._width = student.projection
        for key, info in teachers.items():
            if info.projection != student.projection:
                raise ConfigError(
                    f"teachers.{key}: its vectors have {info.projection} numbers, those of the student "
                    f"{student.projection}; set teachers.{key}.args.num_classes and student.args.num_classes alike"
                )

    def views(self) -> list[View]:
        return [View(size=self.settings.img_size, scale=self.options.scale, resize=self.options.resize,
                     interpolation="bilinear", jitter=0.0, gray=0.0, blur=0.0, solarise=0.0)]  # fmt: skip

    def initialise(self, student: nn.Module) -> None:
        if self.options.init == "released":
            init_clip(student)

    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        return DimeFmModel(student)

    def companions(self, beside: Beside) -> list[Companion]:
        found = [beside.text_vectors(), *([] if self.options.online else [beside.image_vectors()])]
        for companion in found:
            check_width(companion.features, self._width)
        return list(found)

    def reads(self) -> tuple[str, ...]:
        return ("cls",)

    @torch.no_grad()
    def targets(self, features: dict[str, Features], batch: Batch) -> Targets:
        """Vectors of the images, from the table or from a teacher that sees them, and of as many sentences."""
        image = next(iter(features.values())).cls if self.options.online else batch.extra[IMAGE]
        return {IMAGE: image, TEXT: batch.extra[TEXT]}

    def losses(self, outputs: Tensor, targets: Targets, batch: Batch) -> tuple[Tensor, Report]:
        """In float32 whatever the student computes in; outputs and targets are those of the global batch."""
        o, image_BD = self.options, targets[IMAGE]
        weights = Weights(o.vl, o.pvl, o.udist, o.t_vl, o.t_pvl, o.t_udist)
        total, terms = score_losses(outputs, image_BD, targets[TEXT], weights, o.pvl > 0, o.udist > 0)
        if o.vector > 0:
            terms["vector"] = vector_distance(outputs, image_BD)
            total = total + o.vector * terms["vector"]
        return total, {f"loss/{name}": term.detach() for name, term in terms.items()}

    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        return groups(module, self.settings.weight_decay)

    def schedules(self, step: int) -> dict[str, float]:
        s, scale = self.settings, self.settings.lr_factor
        lr = unshifted_cosine(late_step(step), base=s.lr * scale, final=s.min_lr * scale, steps=self.steps,
                              start=self.options.warmup_lr * scale, warmup=min(s.warmup_steps, self.steps))  # fmt: skip
        return {"lr": lr}

    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k.removeprefix(ENCODER): v for k, v in weights.items() if k.startswith(ENCODER)}

    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        return 0.0


METHOD = DimeFm
