"""The trainable network: any timm model, from scratch or from weights, described by `Info`."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from core.config import ConfigError, Student, nearest
from core.methods.base import Info
from core.models.locate import read_weights
from core.models.vit import set_drop_path
from core.models.weights import load_strict


def create(name: str, args: dict[str, Any], img_size: int | None, field: str) -> nn.Module:
    """A headless timm model with random weights.  Raises ConfigError for an unknown name or argument."""
    if name not in timm.list_models(name):
        raise ConfigError(f"{field}.name: timm has no model {name!r}{nearest(name, timm.list_models())}")
    arguments = {**({"img_size": img_size} if img_size else {}), **args}
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **arguments)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{field}: timm cannot build {name} with {arguments}: {error}") from None
    return model


def describe(model: nn.Module, name: str, img_size: int, field: str) -> Info:
    """Shapes of a model's features for images of `img_size`.  Raises ConfigError when the grid does not divide it."""
    if not isinstance(model, VisionTransformer):
        return Info(name, int(getattr(model, "num_features", 0)), 0, 0, (0, 0), 0, has_cls=False, is_vit=False)
    patch = int(model.patch_embed.patch_size[0])
    if img_size % patch:
        raise ConfigError(
            f"{field}: {name} has patches of {patch} pixels, which do not divide images of {img_size}; "
            f"use train.img_size={img_size // patch * patch or patch}"
        )
    grid = (img_size // patch, img_size // patch)
    has_cls = bool(model.has_class_token)
    prefix = int(model.num_prefix_tokens)
    return Info(name, int(model.embed_dim), len(model.blocks), patch, grid, prefix, has_cls, is_vit=True)


def build_student(student: Student, img_size: int, seed: int, root: str) -> tuple[nn.Module, Info]:
    """The student for one stage, the same on every rank: its initial weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create(student.name, student.args, img_size, "student")
    info = describe(model, student.name, img_size, "student")
    if student.weights:
        load_strict(model, read_weights(student.weights, student.name, root))
    if info.is_vit:
        set_drop_path(model, student.drop_path)
    return model, info
