"""The contract between a method and everything else.

A method is one file in this folder: a class `Method` subclass named `METHOD`, found by the file's name. The loop, the
engine, the checkpoints and the launchers know only what is declared here, so a new method changes no other line.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from core.comm import Comm
from core.config import ConfigError
from core.data.views import Crops, RandomCrops, View
from core.recipe import Train

if TYPE_CHECKING:
    from core.data.features import Beside
    from core.data.loader import Companion
    from core.engine import Engine

Report = dict[str, Tensor]
Outputs = Callable[["Batch"], "Features"]  # of one teacher, computed or stored
Vectors = Literal["images", "texts"]  # of whole, clean images row for row, and of sentences unrelated to images


@dataclass(frozen=True)
class Info:
    """What is known of a student or teacher before its weights are: shapes and the features it can give."""

    name: str
    dim: int
    depth: int
    patch: int  # pixels per patch token, a side
    grid: tuple[int, int]  # of patch tokens for the stage's images; (0, 0) for networks that give none
    prefix: int  # class and register tokens in front of the patch tokens
    has_cls: bool
    is_vit: bool  # a plain ViT: the output of every block can be taken
    img_size: int = 0  # of the images it gets in this stage
    projection: int = 0  # width of the linear map on its pooled feature, 0 without one


def check_widths(teachers: dict[str, Info]) -> None:
    """For methods with one head per teacher: class features as wide as the patch tokens.  Raises ConfigError."""
    for key, teacher in teachers.items():
        if teacher.projection not in (0, teacher.dim):
            raise ConfigError(
                f"teachers.{key}.cls: class features of {teacher.projection} channels beside patch tokens of "
                f"{teacher.dim}; this method needs one width: use token or pooled"
            )


@dataclass(frozen=True)
class Features:
    """One teacher's output for a micro-batch."""

    cls: Tensor  # (B, D)
    patch: Tensor  # (B, N, D)


@dataclass(frozen=True)
class Batch:
    """One canonical micro-batch on the device: what the trainable module's forward gets."""

    views: dict[str, Tensor]  # name -> (B, 3, S, S) float32, ImageNet-normalised; the module gets the compute precision
    index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))  # (B,) sample ids, on the CPU
    seed: int = 0
    epoch: int = 0
    micro: int = 0  # position of this micro-batch in the global batch
    training: bool = True
    labels: Tensor | None = None  # (B,) int64, -1 where a sample has none
    extra: dict[str, Tensor] = field(default_factory=dict)  # what crops, companions and `prepare` add, as it is


class Method(ABC):
    """What is learnt from the teachers. One instance lives for one stage of a run."""

    Options: ClassVar[type]
    per_parameter_clip: ClassVar[bool] = False  # else `train.clip` bounds the global gradient norm
    needs_teachers: ClassVar[bool] = True  # else a stage of this method loads none
    needs_labels: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False  # the loss is one of the whole global batch: see core.coupled
    teacher_view: ClassVar[str] = "image"  # the view that teachers see
    epoch_steps: int = 1  # optimiser steps of one pass over the data

    def __init__(self, options: Any, settings: Train, steps: int) -> None:
        self.options, self.settings, self.steps = options, settings, steps

    @classmethod
    def uses_teachers(cls, options: dict[str, Any]) -> bool:
        """Whether a stage with these options of a recipe loads the recipe's teachers."""
        return cls.needs_teachers

    @classmethod
    def reads_vectors(cls, options: dict[str, Any]) -> tuple[Vectors, ...]:
        """Vectors of the recipe's one teacher that `companions` reads, which nobody computes while the stage trains."""
        return ()

    @abstractmethod
    def check(self, student: Info, teachers: dict[str, Info]) -> None:
        """Refuse a pair that cannot work, with the reason, before anything is built.  Raises ConfigError."""

    def check_labels(self, classes: int, field: str) -> None:
        """Refuse images of so many labelled classes (0 = no labels), named by their field.  Raises ConfigError."""
        if self.needs_labels and not classes:
            raise ConfigError(f"{field}: this stage learns labels, and these images have none; use class folders")

    @abstractmethod
    def views(self) -> list[View]:
        """Crops the data side must produce for every sample."""

    def initialise(self, student: nn.Module) -> None:  # noqa: B027 (most methods keep timm's)
        """Initial weights of the student where they are not timm's; weights of the recipe are loaded over them."""

    @abstractmethod
    def build(self, student: nn.Module, info: Info, teachers: dict[str, Info]) -> nn.Module:
        """The one trainable module: student and heads, `forward(batch) -> outputs`. Parameters that cannot get a
        gradient must have requires_grad False. A module that reads parameters of submodules without calling them
        lists these in `external_parameters()` (ZeRO-3 must know)."""

    @abstractmethod
    def targets(self, features: dict[str, Features], batch: Batch) -> Any:
        """What the student is to match, from the teachers' outputs; no gradient."""

    @abstractmethod
    def losses(self, outputs: Any, targets: Any, batch: Batch) -> tuple[Tensor, Report]:
        """Scalar loss and scalars to log, both on the device. Nothing in the report takes part in the loss."""

    @abstractmethod
    def param_groups(self, module: nn.Module) -> list[dict[str, Any]]:
        """Groups with keys params, names, weight_decay; lr_scale, if the learning rate differs; frozen_steps, if the
        optimiser is to leave the group alone in the first steps of the stage."""

    @abstractmethod
    def schedules(self, step: int) -> dict[str, float]:
        """Values at a step of this stage; `lr` is required, `weight_decay` optional, others are the method's own."""

    @abstractmethod
    def export(self, weights: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Student in timm's keys from the trainable module's weights, or from the method's `state`."""

    @abstractmethod
    def head_flops(self, info: Info, teachers: dict[str, Info]) -> float:
        """FLOPs per image of the forward pass of everything in `build` beside the student (multiply-add = 2)."""

    def student_flops(self, forward: Callable[[int], float]) -> tuple[float, float]:
        """FLOPs per image of the student's passes with and without gradient.  forward: of one, by pixels a side."""
        return forward(self.settings.img_size), 0.0

    def crops(self) -> Crops:
        """Where each sample's views are cut out; it is sent to the loader's workers."""
        return RandomCrops(tuple(self.views()))

    def companions(self, beside: Beside) -> list[Companion]:
        """What is read with every micro-batch beside its images, into `Batch.extra`.  Raises DataError, StoreError."""
        return []

    def prepare(self, batch: Batch) -> Batch:
        """What is drawn per micro-batch (masks, mix-up), on the device, before teachers and student see it. Draws are
        keyed by (seed, epoch, index or micro), so that no world size changes them."""
        return batch

    def reads(self) -> tuple[str, ...]:
        """What `targets` takes of `Features`; the rest is not stored."""
        return ("cls", "patch")

    def pixels(self) -> dict[str, Any]:
        """What `prepare` does to the images that teachers see, as plain data: stored outputs are of such images."""
        return {}

    def lr(self, step: int, scale: float) -> float:
        """Learning rate of a group whose lr_scale is `scale`."""
        return self.schedules(step)["lr"] * scale

    def attach(self, engine: Engine, rebuild: Callable[[], nn.Module]) -> None:  # noqa: B027
        """Called once the engine stands, for methods that follow its weights; `rebuild` makes another such module."""

    def take_over(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights for this stage's module from those of the stage before, which may be of another method."""
        return weights

    def after_step(self, step: int, comm: Comm) -> Report:
        """Runs after the optimiser, on every rank: merge statistics, average weights. Returns scalars to log."""
        return {}

    def to(self, device: torch.device) -> None:  # noqa: B027 (most methods keep nothing)
        """Move the method's own state."""

    def state(self) -> dict[str, Tensor]:
        """State beside the module's weights (statistics, centres, queues), equal on all ranks."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Take over `state()` of an earlier attempt or stage."""


def stored_shapes(method: Method, info: Info) -> dict[str, list[int]]:
    """Of what is stored of one image of a teacher, by name."""
    shapes = {"cls": [info.projection or info.dim], "patch": [info.grid[0] * info.grid[1], info.dim]}
    return {name: shapes[name] for name in method.reads() if shapes[name][0]}


def external_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """(reader, parameter) pairs of submodules that read parameters they do not own."""
    for part in module.modules():
        declared = getattr(part, "external_parameters", None)
        for parameter in declared() if callable(declared) else ():
            yield part, parameter
