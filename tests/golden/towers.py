"""Towers of the product at the sizes of a case's parameters, whatever their upstream layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import GluMlp, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.methods.base import Features, Info
from core.models.features import take
from core.models.weights import load_strict, to_timm

CLIP = {"norm_layer": nn.LayerNorm, "act_layer": "quick_gelu", "pre_norm": True}  # LayerNorm's eps is 1e-5


def layout_of(state: Mapping[str, Any]) -> str:
    """CLIP's names, or those that DINOv2 and SynCLR share."""
    return "clip" if "class_embedding" in state or "conv1.weight" in state else "dinov2"


def tower(state: Mapping[str, Tensor], heads: int, layout: str | None = None, img_size: int | None = None,
          load: bool = True) -> VisionTransformer:  # fmt: skip
    """timm's ViT with the upstream weights, in float64; a mask token is left to the caller.

    img_size: of the position table the model gets; None: the table's own.
    """
    layout = layout or layout_of(state)
    own = to_timm(dict(state), layout)
    dim, patch = own["patch_embed.proj.weight"].shape[0], own["patch_embed.proj.weight"].shape[-1]
    hidden, back = own["blocks.0.mlp.fc1.weight"].shape[0], own["blocks.0.mlp.fc2.weight"].shape[1]
    gated: dict[str, Any] = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if hidden == 2 * back else {}
    side = math.isqrt(own["pos_embed"].shape[1] - 1)
    model = VisionTransformer(
        img_size or side * patch, patch, num_classes=0, embed_dim=dim, num_heads=heads, mlp_ratio=(hidden + 0.5) / dim,
        depth=len({key.split(".")[1] for key in own if key.startswith("blocks.")}),
        init_values=1.0 if "blocks.0.ls1.gamma" in own else None, **gated, **(CLIP if layout == "clip" else {}),
    )  # fmt: skip
    if load:
        load_strict(model.double(), own)
    return model


def info_of(model: VisionTransformer, name: str, img_size: int) -> Info:
    patch = int(model.patch_embed.patch_size[0])
    side = img_size // patch
    return Info(name, model.embed_dim, len(model.blocks), patch, (side, side), model.num_prefix_tokens, True, True,
                img_size)  # fmt: skip


def gated(model: VisionTransformer) -> bool:
    """Whether its MLPs are SwiGLUs."""
    return isinstance(model.blocks[0].mlp, GluMlp)


@torch.no_grad()
def features_of(model: VisionTransformer, images: Tensor, normed: bool = True) -> Features:
    """Class token after the final norm, patch tokens after it or before it."""
    return Features(take(model.eval(), images, "token")[0], take(model, images, "token", normed)[1])
