"""The trainable network: any timm model, from scratch or from weights, described by `Info`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import timm
import torch
from torch import nn

from core.config import ConfigError, nearest
from core.methods.base import Info
from core.models.arguments import check_arguments
from core.models.clip import as_projection
from core.models.drop_path import remove_drop_path
from core.models.features import family, stride
from core.models.known import KNOWN
from core.models.locate import read_weights
from core.models.swin import use_masks_in_compute_precision
from core.models.variants import own_arguments, vary
from core.models.vit import set_drop_path
from core.models.weights import load_strict
from core.recipe import Student

ELSEWHERE = {
    "img_size": "the size of a stage's images is train.img_size",
    "drop_path_rate": "the rate of stochastic depth is student.drop_path",
}


def create(name: str, args: dict[str, Any], img_size: int | None, field: str) -> nn.Module:
    """A timm model with random weights, for images of `img_size` where its weights depend on that.

    Without a head, or (args: num_classes) with one that is a projection: it has no bias to train.
    Raises ConfigError for an unknown name or argument, and for one that would load weights or be dropped.
    """
    check_arguments(args, field)
    if name not in timm.list_models(name):
        base, _, tag = name.partition(".")
        hint = f"; {tag!r} names weights: write name: {base} and weights: hub:timm/{name}" if tag else ""
        raise ConfigError(
            f"{field}.name: timm has no model {name!r}{hint or nearest(name, [*KNOWN, *timm.list_models()])}"
        )
    arguments = build_arguments(name, args, img_size)
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **{"num_classes": 0, **arguments})
        model = vary(model, name, own_arguments(name, args))
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{field}: timm cannot build {name} with {arguments}: {error}") from None
    return use_masks_in_compute_precision(as_projection(model))


def build_arguments(name: str, args: dict[str, Any], img_size: int | None) -> dict[str, Any]:
    """What `timm.create_model` is given: the image size too where a model's weights depend on it."""
    config = timm.get_pretrained_cfg(name)
    sized = img_size is not None and (config is None or config.fixed_input_size)
    own = own_arguments(name, args)
    return {**({"img_size": img_size} if sized else {}), **{key: args[key] for key in args if key not in own}}


def describe(model: nn.Module, name: str, img_size: int, field: str) -> Info:
    """Shapes of a model's features for images of `img_size`.  Raises ConfigError when the grid does not divide it."""
    net, patch = cast(Any, model), stride(model)
    dim, out = int(getattr(net, "num_features", 0)), int(getattr(net, "num_classes", 0) or 0)
    if not patch:
        return Info(name, dim, 0, 0, (0, 0), 0, has_cls=False, is_vit=False, img_size=img_size, projection=out)
    if img_size % patch:
        raise ConfigError(
            f"{field}: {name} has patches of {patch} pixels, which do not divide images of {img_size}; "
            f"use train.img_size={img_size // patch * patch or patch}"
        )
    grid = (img_size // patch, img_size // patch)
    if family(model) == "swin":
        depth = sum(len(layer.blocks) for layer in net.layers)
        return Info(name, dim, depth, patch, grid, 0, has_cls=False, is_vit=False, img_size=img_size, projection=out)
    has_cls, prefix = bool(getattr(net, "has_class_token", True)), int(net.num_prefix_tokens)
    is_vit = family(model) == "vit"
    return Info(name, int(net.embed_dim), len(net.blocks), patch, grid, prefix, has_cls, is_vit, img_size, out)


def describe_student(student: Student, img_size: int) -> Info:
    """Shapes of the student for one stage, from meta tensors: nothing is allocated, no weights are needed.

    Raises ConfigError.
    """
    for name, place in ELSEWHERE.items():
        if name in student.args:
            raise ConfigError(f"student.args.{name}: {place}; remove this one")
    with torch.device("meta"):
        return describe(create(student.name, student.args, img_size, "student"), student.name, img_size, "student")


def build_student(
    student: Student, img_size: int, seed: int, root: str, initialise: Callable[[nn.Module], None] | None = None
) -> tuple[nn.Module, Info]:
    """The student for one stage, the same on every rank: its initial weights depend on `seed` alone.

    initialise: the method's rule for initial weights, where it has one; a student's own weights are loaded after it.
    Raises ConfigError, WeightsError, StoreError.
    """
    info = describe_student(student, img_size)
    own = {} if info.is_vit or not student.drop_path else {"drop_path_rate": student.drop_path}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create(student.name, own | student.args, img_size, "student")
        if initialise is not None:
            initialise(model)
    if student.weights:
        load_strict(model, read_weights(student.weights, student.name, root), fit_positions=True)
    if not student.drop_path:
        remove_drop_path(model)
    elif info.is_vit:
        try:
            set_drop_path(model, student.drop_path)
        except TypeError as error:
            raise ConfigError(f"student.drop_path: {student.name}: {error}") from None
    return model, info
