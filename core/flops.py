"""Floating-point operations per image, counted from shapes (a multiply-add is 2), heads and teachers included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core.methods.base import Info, stored_shapes
from core.models.students import create as create_model
from core.models.students import describe
from core.models.teachers import create_teacher, describe_teachers
from core.recipe import Recipe
from core.registry import at_stage, create


@dataclass(frozen=True)
class StageCost:
    """Forward FLOPs per image and sizes of one stage's networks."""

    student: float
    heads: float
    teachers: dict[str, float]
    student_params: int
    head_params: int
    teacher_params: dict[str, int]
    activation_units: float  # tokens x width x blocks of the student, per image
    outputs: dict[str, dict[str, list[int]]]  # shapes of each teacher's that targets take, per image

    @property
    def step(self) -> float:
        """Of one training step, per image: teachers once, student and heads three times (forward and backward)."""
        return sum(self.teachers.values()) + 3 * (self.student + self.heads)


def vit_flops(model: nn.Module, info: Info) -> float:
    """Forward pass of a plain ViT: every linear layer of the blocks on T tokens, attention, patch embedding."""
    patches = info.grid[0] * info.grid[1]
    tokens = patches + info.prefix
    conv = cast(Any, model.patch_embed).proj
    total = 2.0 * patches * conv.weight.numel()
    for block in cast(Any, model.blocks):
        linear = sum(m.in_features * m.out_features for m in block.modules() if isinstance(m, nn.Linear))
        attention = block.attn.num_heads * block.attn.head_dim  # width of q, k and v
        total += 2.0 * tokens * linear + 4.0 * tokens**2 * attention
    return float(total)


def counted_flops(model: nn.Module, img_size: int) -> float:
    """Forward pass per image by torch's counter; the model must be on the meta device."""
    counts = []
    for batch in (1, 2):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model.eval()(torch.empty(batch, 3, img_size, img_size, device="meta"))
        counts.append(counter.get_total_flops())
    return float(counts[1] - counts[0])  # without what a batch needs once, such as SwinV2's table of biases


def network_flops(model: nn.Module, info: Info, img_size: int) -> float:
    return vit_flops(model, info) if info.is_vit else counted_flops(model, img_size)


def stage_cost(recipe: Recipe, stage: str) -> StageCost:
    """Cost of one stage from meta tensors: nothing is allocated, no weights are needed.  Raises ConfigError."""
    settings, recipe = recipe.stage(stage), at_stage(recipe, stage)
    method = create(recipe, settings, 1)
    with torch.device("meta"):
        student = create_model(recipe.student.name, recipe.student.args, settings.img_size, "student")
        info = describe(student, recipe.student.name, settings.img_size, "student")
        infos = describe_teachers(recipe, info)
        method.check(info, infos)
        own = _params(student)
        trained, untrained = method.student_flops(partial(_at_size, student, recipe.student.name))
        teachers, teacher_params = {"student without gradient": untrained} if untrained else {}, {}
        for key, teacher in recipe.teachers.items():
            model = create_teacher(teacher, f"teachers.{key}", infos[key].img_size)
            teachers[key] = network_flops(model, infos[key], infos[key].img_size)
            teacher_params[key] = _params(model)
        everything = _params(method.build(student, info, infos))
    units = (info.grid[0] * info.grid[1] + info.prefix) * info.dim * info.depth
    outputs = {key: stored_shapes(method, infos[key]) for key in recipe.teachers}
    return StageCost(trained, method.head_flops(info, infos), teachers, own, everything - own, teacher_params,
                     float(units), outputs)  # fmt: skip


def _at_size(model: nn.Module, name: str, img_size: int) -> float:
    return network_flops(model, describe(model, name, img_size, "student"), img_size)


def _params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
