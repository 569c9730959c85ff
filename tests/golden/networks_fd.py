"""Networks of Feature-Distillation's cases, built by the product's own builder at the sizes that a case names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.methods.base import Info
from core.models import students
from core.models.students import create
from core.models.teachers import FrozenTeacher
from core.models.weights import load_strict, to_timm
from core.recipe import Teacher
from tests.golden.networks import tensor
from tests.golden.runner import Case

VIT, CLIP, BEIT = "vit_base_patch16_224", "vit_base_patch16_clip_quickgelu_224", "beit_base_patch16_224"
SWIN, SWINV2 = "swin_base_patch4_window7_224", "swinv2_base_window8_256"


def meta(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(str(case["meta"]))
    return found


def sides(grid: int | list[int]) -> tuple[int, int]:
    """Rows and columns of a grid that a case names by one number or two."""
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    return rows, columns


def params(case: Case, prefix: str = "param/") -> dict[str, Tensor]:
    return {name: tensor(array) for name, array in case.below(prefix).items()}


def beit(hp: Mapping[str, Any]) -> nn.Module:
    """A Beit with the parts that the case names; it norms its tokens, or their mean."""
    pooled = hp.get("use_mean_pooling", hp.get("num_classes", 0) > 0)
    args = {
        "img_size": hp["img_size"], "patch_size": hp["patch_size"], "embed_dim": hp["embed_dim"],
        "depth": hp["depth"], "num_heads": hp["num_heads"], "mlp_ratio": hp.get("mlp_ratio", 4),
        "init_values": hp.get("init_values") or 0, "qkv_bias": hp.get("qkv_bias", True),
        "drop_path_rate": _drop_path(hp), "use_rel_pos_bias": hp.get("use_rel_pos_bias", False),
        "use_shared_rel_pos_bias": hp.get("use_shared_rel_pos_bias", False),
        "use_abs_pos_emb": hp.get("use_abs_pos_emb", False), "class_token": hp.get("with_cls_token", True),
        "use_fc_norm": pooled, "global_pool": "avg" if pooled or not hp.get("with_cls_token", True) else "token",
        **_norm_eps(hp),
    }  # fmt: skip
    return create(BEIT, args, None, "student")


def distilled(hp: Mapping[str, Any]) -> dict[str, Any]:
    """Of the distillation stage, where a case describes the network that is fine-tuned after it."""
    shared = hp.get("use_rel_pos_bias", False) or hp.get("use_shared_rel_pos_bias", False)
    return {**hp, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": shared, "use_mean_pooling": False}


def _drop_path(hp: Mapping[str, Any]) -> float:
    return float(hp.get("drop_path_rate", hp.get("drop_path", 0.0)))


def _norm_eps(hp: Mapping[str, Any]) -> dict[str, float]:
    """Where a case tells it; as a number, or as `layernorm eps=1e-6`."""
    found = hp.get("norm_eps") or eps_in(str(hp.get("norm_layer", "")))
    return {"norm_eps": float(found)} if found else {}


def eps_in(text: str) -> float | None:
    found = re.search(r"eps *=? *([\d.e-]+)", text)
    return float(found[1]) if found else None


def swin(hp: Mapping[str, Any], name: str) -> nn.Module:
    plain = ("img_size", "patch_size", "embed_dim", "window_size", "mlp_ratio", "qkv_bias")
    own = ("rpe_hidden", "use_shared_rel_pos_bias") if name == SWINV2 else ()
    args = {key: hp[key] for key in (*plain, *own) if key in hp}
    args |= {"depths": tuple(hp["depths"]), "num_heads": tuple(hp["num_heads"])} | _norm_eps(hp)
    return create(name, args | {"drop_path_rate": _drop_path(hp)}, None, "student")


def student(hp: Mapping[str, Any]) -> nn.Module:
    """A SwinV2 where the case counts depths by stage, else a Beit."""
    return swin(hp, SWINV2) if "depths" in hp else beit(hp)


def layout(hp: Mapping[str, Any]) -> str:
    return "swin" if "depths" in hp else "beit"


def described(model: nn.Module, img_size: int) -> Info:
    return students.describe(model, "network", img_size, "network")


def plain_vit(
    state: Mapping[str, Tensor], heads: int, img_size: int, name: str = VIT, norm_eps: float | None = None
) -> nn.Module:
    """A teacher of a state dict's sizes, in timm's keys, loaded."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    args = {"img_size": img_size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads,
            "mlp_ratio": (state["blocks.0.mlp.fc1.weight"].shape[0] + 0.5) / dim,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state}  # fmt: skip
    args |= {} if norm_eps is None else {"norm_eps": norm_eps}
    return loaded(create(name, args, None, "teacher"), dict(state))


def swin_v1(state: Mapping[str, Tensor], img_size: int, norm_eps: float | None) -> nn.Module:
    """A Swin of the sizes of a state dict in timm's keys: heads and windows are those of its bias tables."""
    tables = {key: value for key, value in state.items() if key.endswith("relative_position_bias_table")}
    stages = [[value for key, value in tables.items() if key.startswith(f"layers.{s}.")]
              for s in range(len({key.split(".")[1] for key in tables}))]  # fmt: skip
    dim, patch = state["patch_embed.proj.weight"].shape[0], state["patch_embed.proj.weight"].shape[-1]
    hp = {"img_size": img_size, "patch_size": patch, "embed_dim": dim, "depths": [len(each) for each in stages],
          "num_heads": [each[0].shape[1] for each in stages], "norm_eps": norm_eps,
          "window_size": (math.isqrt(max(len(table) for table in tables.values())) + 1) // 2,
          "mlp_ratio": (state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] + 1e-3) / dim}  # fmt: skip
    return loaded(swin(hp, SWIN), dict(state))


def teacher(state: Mapping[str, Tensor], text: str, img_size: int, info: Info) -> tuple[FrozenTeacher, Info]:
    """A distillation's teacher: its weights under their original names, heads and epsilon as a case's text has them."""
    eps, heads = eps_in(text), re.search(r"heads *\[?(\d+)", text)
    kind, cls = VIT, "token"
    if any(key.startswith("layers.") for key in state):
        kind, cls = SWIN, "pooled"
        model = swin_v1(to_timm(state, "swin"), img_size, eps)
    else:
        assert heads is not None, "the case does not tell its teacher's heads"
        clip = {"conv1.weight", "visual.conv1.weight"} & state.keys()
        kind = CLIP if clip else VIT
        model = plain_vit(to_timm(state, "clip" if clip else "timm"), int(heads[1]), img_size, kind, eps)
    own = described(model, img_size)
    normalize = "own" if kind == CLIP else "student"
    return FrozenTeacher(Teacher(name=kind, weights="random", cls=cls, normalize=normalize), model, own, info), own


def loaded(model: nn.Module, state: dict[str, Tensor], layout: str | None = None) -> nn.Module:
    """In float64 and evaluation mode."""
    model = model.double().eval()
    load_strict(model, to_timm(state, layout))
    return model


def describe(dim: int, depth: int, patch: int, img_size: int, prefix: int = 1, is_vit: bool = True) -> Info:
    grid = (img_size // patch, img_size // patch)
    return Info("network", dim, depth, patch, grid, prefix, has_cls=prefix > 0, is_vit=is_vit, img_size=img_size)


def in_module(name: str, hp: Mapping[str, Any]) -> str:
    """The product's name of an upstream parameter of the distillation or the fine-tuning network; "" if it has none."""
    if name.startswith(("decoder.", "head.")):
        return name
    bare = in_timm(name.removeprefix("encoder."), layout(hp))
    return bare and f"encoder.{bare}"


def in_timm(name: str, layout: str) -> str:
    """timm's name of an upstream parameter by the product's own conversion; "" for what it drops: buffers, and biases
    of keys, which have no effect."""
    return next(iter(to_timm({name: torch.empty(0)}, layout)), "")
