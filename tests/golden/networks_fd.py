"""Networks of Feature-Distillation's cases, built by the product's own builder at the sizes that a case names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core.methods.base import Info
from core.models.students import create
from core.models.weights import load_strict, to_timm
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


def beit(hp: Mapping[str, Any], shared: bool) -> nn.Module:
    """The student of distillation (one shared table, all tokens) or of fine-tuning (own tables, patch mean)."""
    args = {
        "img_size": hp["img_size"], "patch_size": hp["patch_size"], "embed_dim": hp["embed_dim"],
        "depth": hp["depth"], "num_heads": hp["num_heads"], "mlp_ratio": hp.get("mlp_ratio", 4),
        "init_values": hp["init_values"], "qkv_bias": hp["qkv_bias"], "drop_path_rate": hp.get("drop_path_rate", 0.0),
        "use_rel_pos_bias": not shared, "use_shared_rel_pos_bias": shared, "use_abs_pos_emb": hp["use_abs_pos_emb"],
        "global_pool": "token" if shared else "avg", **_norm_eps(hp),
    }  # fmt: skip
    return create(BEIT, args, None, "student")


def _norm_eps(hp: Mapping[str, Any]) -> dict[str, float]:
    """Where a case tells it; as a number, or as `layernorm eps=1e-6`."""
    found = hp.get("norm_eps") or str(hp.get("norm_layer", "")).partition("eps=")[2]
    return {"norm_eps": float(found)} if found else {}


def swin(hp: Mapping[str, Any], name: str) -> nn.Module:
    keys = ("img_size", "patch_size", "embed_dim", "window_size")
    args = {key: hp[key] for key in keys} | {"depths": tuple(hp["depths"]), "num_heads": tuple(hp["num_heads"])}
    args |= _norm_eps(hp) | ({"mlp_ratio": hp["mlp_ratio"]} if "mlp_ratio" in hp else {})
    return create(name, args, None, "student")


def student(hp: Mapping[str, Any], shared: bool = True) -> nn.Module:
    """A SwinV2 where the case counts depths by stage, else a Beit."""
    return swin(hp, SWINV2) if "depths" in hp else beit(hp, shared)


def plain_vit(
    state: Mapping[str, Tensor], heads: int, img_size: int, name: str = VIT, norm_eps: float | None = None
) -> nn.Module:
    """A teacher of a state dict's sizes, in timm's keys, loaded."""
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    args = {"img_size": img_size, "patch_size": patch, "embed_dim": dim, "depth": depth, "num_heads": heads,
            "mlp_ratio": (state["blocks.0.mlp.fc1.weight"].shape[0] + 0.5) / dim}  # fmt: skip
    args |= {} if norm_eps is None else {"norm_eps": norm_eps}
    return loaded(create(name, args, None, "teacher"), dict(state))


def loaded(model: nn.Module, state: dict[str, Tensor], layout: str | None = None) -> nn.Module:
    """In float64 and evaluation mode."""
    model = model.double().eval()
    load_strict(model, to_timm(state, layout))
    return model


def describe(dim: int, depth: int, patch: int, img_size: int, prefix: int = 1, is_vit: bool = True) -> Info:
    grid = (img_size // patch, img_size // patch)
    return Info("network", dim, depth, patch, grid, prefix, has_cls=prefix > 0, is_vit=is_vit, img_size=img_size)


def in_timm(name: str, layout: str) -> str:
    """timm's name of an upstream parameter by the product's own conversion; "" for buffers, which it drops."""
    return next(iter(to_timm({name: torch.empty(0)}, layout)), "")
