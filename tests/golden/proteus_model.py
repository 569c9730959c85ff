"""The Proteus method at the sizes of a case: its module with the recorded weights, and its batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from core.data.masks import place_masks
from core.methods.base import Batch, Info
from core.methods.proteus import Proteus, ProteusOptions, mask_tensors
from core.models.adapters import MaskedStudent
from core.models.weights import to_timm
from core.recipe import Train
from tests.golden.networks import tensor
from tests.golden.runner import Check
from tests.golden.towers import gated, info_of, layout_of, tower

HEADS = {"token": "token_head", "feature": "fea_head", "patch": "patch_head"}
TEACHER = "teacher"
CLIP_PARTS = ("transformer.", "conv1.", "class_embedding", "positional_embedding", "ln_")  # also of a selection


def tensors(arrays: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Arrays under a prefix as float64 tensors, without the prefix."""
    return {key.removeprefix(prefix): torch.from_numpy(np.array(arrays[key], np.float64))
            for key in arrays if key.startswith(prefix)}  # fmt: skip


def in_product(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arrays under upstream's names (weights, gradients, averages; parts of a model too) under the product's."""
    out = {}
    backbone = {k.removeprefix("student.backbone."): v for k, v in named.items() if k.startswith("student.backbone.")}
    if "mask_token" in backbone:
        out["mask_token"] = backbone["mask_token"].reshape(1, -1)
    backbone = {key: value for key, value in backbone.items() if key != "mask_token"}
    if backbone:
        out |= {f"student.{k}": v for k, v in to_timm(backbone, layout_of(named_backbone(named))).items()}
    for kind, released in HEADS.items():
        own = {k.removeprefix(released): v for k, v in named.items() if k.startswith(f"{released}.")}
        out |= {f"heads.{TEACHER}.{kind}{rest}": value for rest, value in own.items()}
    return out


def by_array(case: Mapping[str, Any], group: str, prefix: str = "") -> Iterator[tuple[str, str, Tensor]]:
    """(array, name in the product, values) of recorded parameters.  prefix: of upstream's names that was left out."""
    for key in (key for key in case if key.startswith(f"{group}/")):
        for name, values in in_product({f"{prefix}{key.removeprefix(f'{group}/')}": tensor(case[key])}).items():
            yield key, name, values


def sizes(case: Mapping[str, Any], **towers: VisionTransformer) -> Iterator[Check]:
    """What a case says of its towers beside their weights."""
    for name, model in towers.items():
        yield f"patch of the {name}", model.patch_embed.patch_size[0], int(case["patch"]), 0.0
    stated = str(case["teacher_ffn"])
    yield "teacher_ffn", "swiglu" if gated(towers[TEACHER]) else "mlp", stated[: len("swiglu")], 0.0


def named_backbone(named: Mapping[str, Any]) -> dict[str, Any]:
    prefix = "student.backbone."
    out = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
    clip = any(key.startswith(CLIP_PARTS) for key in out)
    return {"class_embedding": None} if clip else out


def build(
    case: Mapping[str, Any], settings: Train, steps: int = 1, all_heads: bool = False, **options: Any
) -> tuple[Proteus, MaskedStudent]:
    """Method and module of a case with `p/` arrays, `lambdas` and `student_heads`; recorded weights are loaded.

    all_heads: also those whose loss has weight 0, which the product leaves out; the method's own weight is then 1.
    """
    params = tensors(case, "p/")
    student = tower({k.removeprefix("student.backbone."): v for k, v in params.items()
                     if k.startswith("student.backbone.")}, int(case["student_heads"]))  # fmt: skip
    heads = [all_heads and f"p/{head}.1.weight" in case for head in HEADS.values()]
    token, feature, patch = (float(w) or float(head) for w, head in zip(case["lambdas"], heads, strict=True))
    if any(key.startswith("p/student.backbone.transformer.") for key in case):
        options.setdefault("undecayed", ["cls_token"])  # a vector in CLIP's own layout
    method = Proteus(ProteusOptions(lambda_token=token, lambda_feature=feature, lambda_patch=patch, **options),
                     settings, steps)  # fmt: skip
    size = case["images" if "images" in case else "images_0"].shape[-1]
    info = info_of(student, "student", size)
    dim = params["token_head.1.weight"].shape[0]
    module = method.build(student, info, {TEACHER: Info(TEACHER, dim, 0, 0, info.grid, 1, True, True, size)}).double()
    given = in_product({k: v for k, v in params.items() if not k.startswith("teacher.")})
    if "patch" not in module.kinds:
        given.pop("mask_token", None)  # a parameter without gradient, which the product leaves out
    unused = tuple(f"heads.{TEACHER}.{kind}." for kind in HEADS if kind not in module.kinds)
    given = {name: value for name, value in given.items() if not name.startswith(unused)}
    module.load_state_dict(given, strict=True)
    return method, module


def batch_of(images: Any, masks: Any, rows: list[int] | None = None) -> Batch:
    """Recorded images (B, 3, S, S) and masks (B, N) as the method's `prepare` hands them on; rows: a part of them."""
    keep = slice(None) if rows is None else rows
    images, marks = np.asarray(images, np.float64)[keep], np.asarray(masks, np.bool_)[keep]
    extra = mask_tensors(place_masks(marks, len(marks)), torch.device("cpu"))
    return Batch({"image": torch.from_numpy(images.copy())}, torch.arange(len(images)), extra=extra)
