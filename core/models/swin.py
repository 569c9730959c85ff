"""Swin under bf16: the masks of shifted windows are float32 buffers, and a sum with them would be float32 as well."""

from __future__ import annotations

from typing import Any

from timm.models import swin_transformer, swin_transformer_v2
from torch import nn

ATTENTIONS = (swin_transformer.WindowAttention, swin_transformer_v2.WindowAttention)


def use_masks_in_compute_precision(model: nn.Module) -> nn.Module:
    """Masks, 0 and -100 and so exact in any precision, reach attention in that of the tokens."""
    for module in model.modules():
        if isinstance(module, ATTENTIONS):
            module.register_forward_pre_hook(_cast_mask, with_kwargs=True)
    return model


def _cast_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    mask = kwargs.get("mask")
    return args, kwargs if mask is None else kwargs | {"mask": mask.to(args[0].dtype)}
