"""Frozen teachers: plain modules outside the engine, in the compute precision, without gradients."""

from __future__ import annotations

import zlib
from dataclasses import replace
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import ConfigError
from core.data.views import IMAGENET_MEAN, IMAGENET_STD
from core.methods.base import Features, Info
from core.models.features import family, take, to_precision
from core.models.locate import use_weights
from core.models.students import create, describe
from core.models.vit import as_vit, set_grid
from core.models.weights import load_strict
from core.recipe import Recipe, Teacher


class FrozenTeacher(nn.Module):
    """One teacher: images as the student sees them in, `Features` out, from the last norm on in float32."""

    def __init__(self, teacher: Teacher, model: nn.Module, info: Info, student: Info) -> None:
        super().__init__()
        self.model, self.cls, self.norm = model, teacher.cls, teacher.norm
        self.size = (info.img_size, info.img_size) if info.img_size != student.img_size else None
        if info.is_vit:
            set_grid(as_vit(model), info.grid, teacher.positions)
        if teacher.normalize == "own":
            _fold_normalisation(model, *own_normalisation(teacher))
        self.requires_grad_(False).eval()

    @torch.no_grad()  # not inference mode, whose tensors a loss could not take as they are
    def forward(self, images: Tensor) -> Features:
        if self.size is not None:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        return Features(*take(self.model, images.to(next(self.model.parameters()).dtype), self.cls, self.norm))


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
    if (own_mean, own_std) == (IMAGENET_MEAN, IMAGENET_STD):
        return
    mean, std = torch.tensor(own_mean), torch.tensor(own_std)
    given_mean, given_std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    conv = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(conv, nn.Conv2d) or any(conv.padding):
        raise ConfigError(
            f"teachers: {type(model).__name__} has no patch embedding that another mean and std could be folded into; "
            "use normalize: student"
        )
    with torch.no_grad():
        shift = ((given_mean - mean) / std).view(1, 3, 1, 1)
        extra = (conv.weight * shift).sum((1, 2, 3))
        conv.bias = nn.Parameter((conv.bias if conv.bias is not None else 0) + extra)
        conv.weight.mul_((given_std / std).view(1, 3, 1, 1))


def create_teacher(teacher: Teacher, field: str, img_size: int | None = None) -> nn.Module:
    """A teacher's network with random weights, at its native size; for images of `img_size` where no position table
    could be resampled (windows, position biases).  Raises ConfigError."""
    if teacher.cls == "projected" and not teacher.args.get("num_classes"):
        raise ConfigError(
            f"{field}.cls: projected needs the width of the projection in {field}.args, for example "
            "{num_classes: 768} for CLIP ViT-L/14"
        )
    model = create(teacher.name, teacher.args, None, field)
    if img_size is None or family(model) not in ("beit", "swin"):
        return model
    return create(teacher.name, {**teacher.args, "img_size": img_size}, None, field)


def describe_teachers(recipe: Recipe, student: Info) -> dict[str, Info]:
    """Shapes of every teacher for the student's patch grid, from meta tensors: no weights needed.

    Raises ConfigError for a teacher that cannot give the features its recipe asks for.
    """
    infos = {}
    for key, teacher in sorted(recipe.teachers.items()):
        field = f"teachers.{key}"
        with torch.device("meta"):
            model = create_teacher(teacher, field)
        probe = describe(model, teacher.name, 0, field)
        if teacher.cls == "token" and not probe.has_cls:
            raise ConfigError(f"{field}.cls: {teacher.name} has no class token; use {field}.cls=pooled")
        # Equal grids, so that patch tokens match one to one; a student without patches leaves images as they are.
        size = student.grid[0] * probe.patch if student.grid[0] and probe.patch else student.img_size
        info = describe(model, teacher.name, size, field)
        infos[key] = info if teacher.cls == "projected" else replace(info, projection=0)
        if probe.patch and not probe.is_vit:
            with torch.device("meta"):
                create_teacher(teacher, field, size)  # timm judges whether windows fit
    return infos


def load_teachers(
    recipe: Recipe, student: Info, infos: dict[str, Info], root: str, device: torch.device, dtype: torch.dtype
) -> dict[str, FrozenTeacher]:
    """Every teacher of a recipe, strictly loaded.  Raises WeightsError, StoreError, ConfigError."""
    loaded = {}
    for key, teacher in sorted(recipe.teachers.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(key.encode()))  # `random` weights differ by teacher and never by rank
            model = create_teacher(teacher, f"teachers.{key}", infos[key].img_size)
        if teacher.weights != "random":
            use_weights(teacher.weights, teacher.name, root, partial(load_strict, model))
        loaded[key] = FrozenTeacher(teacher, model, infos[key], student)
        to_precision(model, device, dtype)
    return loaded
