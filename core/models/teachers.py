"""Frozen teachers: plain modules outside the engine, in the compute precision, without gradients."""

from __future__ import annotations

import zlib
from typing import cast

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import ConfigError, Recipe, Teacher
from core.data.views import IMAGENET_MEAN, IMAGENET_STD
from core.methods.base import Features, Info
from core.models.locate import read_weights
from core.models.students import create, describe
from core.models.vit import as_vit, forward_taps
from core.models.weights import load_strict


def take(vit: nn.Module, images: Tensor, cls: str) -> tuple[Tensor, Tensor]:
    """cls (B, D) and patch (B, N, D) targets of a ViT for images (B, 3, H, W).

    token: both after the final norm.  pooled: timm's pre-logits feature, and patch tokens as the last block (or its
    norm, if the model has one) leaves them; for models without a final norm (dBOT-ft) these are un-normed.
    """
    model = as_vit(vit)
    x: Tensor = model.norm(forward_taps(model, images)[-1])
    pooled = model.forward_head(x, pre_logits=True) if cls == "pooled" else x[:, 0]
    return pooled, x[:, model.num_prefix_tokens :]


class FrozenTeacher(nn.Module):
    """One teacher: images as the student sees them in, `Features` out."""

    def __init__(self, teacher: Teacher, model: nn.Module, info: Info, student: Info) -> None:
        super().__init__()
        self.model, self.cls = model, teacher.cls
        self.size = (info.img_size, info.img_size) if info.img_size != student.img_size else None
        if teacher.normalize == "own":
            _fold_normalisation(model, *own_normalisation(teacher))
        self.requires_grad_(False).eval()

    @torch.no_grad()  # not inference mode, whose tensors a loss could not take as they are
    def forward(self, images: Tensor) -> Features:
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return Features(*take(self.model, images.to(next(self.model.parameters()).dtype), self.cls))


def own_normalisation(teacher: Teacher) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that a teacher's weights were trained with, as timm has them: by hub id, else by model name."""
    tagged = teacher.weights.removeprefix("hub:").removeprefix("timm/")
    config = (timm.get_pretrained_cfg(tagged) if tagged else None) or timm.get_pretrained_cfg(teacher.name)
    if config is None:
        raise ConfigError(f"teachers: timm knows no mean and std of {teacher.name}; use normalize: student")
    return config.mean, config.std


def _fold_normalisation(model: nn.Module, own_mean: tuple[float, ...], own_std: tuple[float, ...]) -> None:
    """Make the patch embedding expect ImageNet-normalised pixels instead of the model's own mean and std.

    With x = (p - m) / s given and y = (p - m') / s' wanted: y = x * s/s' + (m - m')/s', a per-channel affine map that
    a patch embedding (a convolution without padding) absorbs exactly.
    """
    mean, std = torch.tensor(own_mean), torch.tensor(own_std)
    given_mean, given_std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    conv = cast(nn.Conv2d, cast(nn.Module, model.patch_embed).proj)
    with torch.no_grad():
        shift = ((given_mean - mean) / std).view(1, 3, 1, 1)
        extra = (conv.weight * shift).sum((1, 2, 3))
        conv.bias = nn.Parameter((conv.bias if conv.bias is not None else 0) + extra)
        conv.weight.mul_((given_std / std).view(1, 3, 1, 1))


def describe_teachers(recipe: Recipe, student: Info) -> dict[str, Info]:
    """Shapes of every teacher for the student's patch grid, from meta tensors: no weights needed."""
    infos = {}
    for key, teacher in sorted(recipe.teachers.items()):
        with torch.device("meta"):
            model = create(teacher.name, teacher.args, None, f"teachers.{key}")
        probe = describe(model, teacher.name, 0, f"teachers.{key}")
        if not probe.is_vit:
            raise ConfigError(f"teachers.{key}.name: {teacher.name} is no plain ViT; its patch tokens are needed")
        if teacher.cls == "token" and not probe.has_cls:
            raise ConfigError(f"teachers.{key}.cls: {teacher.name} has no class token; use teachers.{key}.cls=pooled")
        # Equal grids, so that patch tokens match one to one; a student without patches leaves images as they are.
        size = student.grid[0] * probe.patch if student.is_vit else student.img_size
        infos[key] = describe(model, teacher.name, size, f"teachers.{key}")
    return infos


def load_teachers(
    recipe: Recipe, student: Info, infos: dict[str, Info], root: str, device: torch.device, dtype: torch.dtype
) -> dict[str, FrozenTeacher]:
    """Every teacher of a recipe, strictly loaded.  Raises WeightsError, StoreError, ConfigError."""
    loaded = {}
    for key, teacher in sorted(recipe.teachers.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(key.encode()))  # `random` weights differ by teacher and never by rank
            model = create(teacher.name, teacher.args, None, f"teachers.{key}")
        if teacher.weights != "random":
            load_strict(model, read_weights(teacher.weights, teacher.name, root))
        loaded[key] = FrozenTeacher(teacher, model, infos[key], student).to(device=device, dtype=dtype)
    return loaded
