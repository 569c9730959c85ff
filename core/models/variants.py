"""Variants of timm's networks that releases have and timm has no argument for, in place and under timm's names.

Of student.args and teachers.*.args, beside what timm takes:
norm_eps          every network: epsilon of every LayerNorm
class_token       Beit: false leaves the patches as its only tokens; their bias tables then have no rows for it
use_shared_rel_pos_bias  SwinV2: the blocks of a stage share one bias network, `layers.{s}.rel_pos_bias`
rpe_hidden        SwinV2: width of the bias networks, 512 in timm
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import timm
import torch
from torch import nn

from core.models.clip import set_norm_eps
from core.models.fused import CosineAttention, StageBias, fuse_attention
from core.models.rel_pos import CLS_ROWS


def own_arguments(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a network's arguments that are not timm's.  name: one that timm knows."""
    return {key: args[key] for key in ("norm_eps", *_variants(name)) if key in args}


def vary(model: nn.Module, name: str, own: Mapping[str, Any]) -> nn.Module:
    """The same model, changed as its own arguments say.  Raises ValueError where they contradict each other."""
    for key, change in _variants(name).items():
        if key in own:
            change(model, own[key])
    return set_norm_eps(model, float(own["norm_eps"])) if "norm_eps" in own else model


def _variants(name: str) -> dict[str, Callable[[nn.Module, Any], None]]:
    return VARIANTS.get(timm.model_entrypoint(name).__module__.rpartition(".")[2], {})


def _class_token(model: nn.Module, there: bool) -> None:
    beit = cast(Any, model)  # timm's Beit
    if there:
        return
    if beit.global_pool == "token":
        raise ValueError("global_pool token needs the class token; use avg")
    # Of no length, so that timm's own forward adds nothing; of bytes, so that tokens keep their precision beside it.
    del beit.cls_token
    beit.register_buffer("cls_token", torch.empty(1, 0, beit.embed_dim, dtype=torch.uint8), persistent=False)
    beit.num_prefix_tokens, beit.has_class_token = 0, False
    if beit.pos_embed is not None:
        beit.pos_embed = nn.Parameter(beit.pos_embed.detach()[:, 1:].clone())
    for module in beit.modules():
        if (table := getattr(module, "relative_position_bias_table", None)) is not None:
            module.relative_position_bias_table = nn.Parameter(table.detach()[:-CLS_ROWS].clone())
    fuse_attention(beit)  # timm's attention counts a class token


def _rpe_hidden(model: nn.Module, width: int) -> None:
    swin = cast(Any, model)  # timm's SwinTransformerV2
    for stage in swin.layers:
        for block in stage.blocks:
            inner, activation, outer = block.attn.cpb_mlp
            inner, outer = nn.Linear(inner.in_features, width), nn.Linear(width, outer.out_features, bias=False)
            for layer in (inner, outer):
                swin._init_weights(layer)
            block.attn.cpb_mlp = nn.Sequential(inner, activation, outer)


def _shared_bias(model: nn.Module, shared: bool) -> None:
    for stage in cast(Any, model).layers if shared else ():
        stage.rel_pos_bias = StageBias(stage.blocks[0].attn)
        for block in stage.blocks:
            block.attn = CosineAttention(block.attn, stage.rel_pos_bias)


# By timm's module, in the order in which they are made.
VARIANTS: dict[str, dict[str, Callable[[nn.Module, Any], None]]] = {
    "beit": {"class_token": _class_token},
    "swin_transformer_v2": {"rpe_hidden": _rpe_hidden, "use_shared_rel_pos_bias": _shared_bias},
}
