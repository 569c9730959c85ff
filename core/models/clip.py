"""CLIP-style image towers in timm: the projection into the space shared with sentences, and their initial weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

PROJECTION_STD = 0.02  # of a Swin's projection


def projection(model: nn.Module) -> nn.Linear | None:
    """timm's classifier, which of a CLIP tower is the projection; None for a headless model."""
    head = cast(Any, model).get_classifier() if hasattr(model, "get_classifier") else None
    return head if isinstance(head, nn.Linear) else None


@torch.no_grad()
def as_projection(model: nn.Module) -> nn.Module:
    """Make timm's classifier a projection without bias: timm always has one, so it is zero and never trained."""
    head = projection(model)
    if head is not None and head.bias is not None:
        nn.init.zeros_(head.bias)
        head.bias.requires_grad_(False)
    return model


def set_norm_eps(model: nn.Module, eps: float) -> nn.Module:
    """Give every LayerNorm this epsilon; the released DIME-FM students have 1e-12 where timm and CLIP have 1e-5."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return model


@torch.no_grad()
def init_clip(model: nn.Module) -> bool:
    """Initialise a ViT as CLIP's visual tower, from torch's generator (section 3 of the DIME-FM notes).

    Of a Swin, whose draws in timm are those of the release, only the projection.  False: another network, left alone.
    """
    if isinstance(model, VisionTransformer):
        _init_vit(model)
        return True
    if isinstance(model, SwinTransformer):
        if (head := projection(model)) is not None:
            nn.init.trunc_normal_(head.weight, std=PROJECTION_STD)
        return True
    return False


def _init_vit(vit: VisionTransformer) -> None:
    """Tokens, position table and projection normal with std width^-0.5, joint query, key and value weights
    Xavier-uniform, biases of attention and projection zero; every other layer as torch initialises it."""
    for module in vit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    head = projection(vit)
    for table in (vit.cls_token, vit.pos_embed, None if head is None else head.weight):
        if table is not None:
            nn.init.normal_(table, std=int(vit.embed_dim) ** -0.5)
    if head is not None and head.bias is not None:
        nn.init.zeros_(head.bias)
    for block in cast(Any, vit.blocks):
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        for layer in (block.attn.qkv, block.attn.proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
