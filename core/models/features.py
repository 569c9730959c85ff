"""What a timm network gives: tokens of its last block, final norm, pooled and projected features, for every family."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, cast

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.models.vit import iterate_taps

Family = Literal["vit", "beit", "swin", "other"]
CLS = ("token", "pooled", "projected")
BEHIND_TOKENS = ("fc_norm.", "attn_pool.", "head.")  # parameters that see tokens only once they are pooled
AFTER_BLOCKS = ("norm", "attn_pool", "fc_norm", "head")  # parts of timm's models that follow the last block


def family(model: nn.Module) -> Family:
    """vit: block outputs can be taken (no convolutional stem, no tokens but class and registers).  beit: positions as
    biases, a class token.  swin: v1 or v2, a map of patches without class token.  other: pooled features only."""
    if isinstance(model, VisionTransformer):
        plain = type(model.patch_embed) is PatchEmbed and not hasattr(model, "dist_token")
        return "vit" if plain else "other"
    if isinstance(model, Beit):
        return "beit"
    return "swin" if isinstance(model, SwinTransformer | SwinTransformerV2) else "other"


def stride(model: nn.Module) -> int:
    """Pixels of an image's side per patch token of the last block; 0 for networks that give none."""
    kind = family(model)
    if kind == "other":
        return 0
    parts = cast(Any, model)
    return int(parts.patch_embed.patch_size[0]) * (2 ** (len(parts.layers) - 1) if kind == "swin" else 1)


def last_tokens(model: nn.Module, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) -> tokens of the last block before the final norm: (B, P+N, D), for Swin (B, h, w, D)."""
    kind = family(model)
    if kind == "vit":
        return deque(iterate_taps(model, images), maxlen=1)[0]
    if kind == "swin":
        swin = cast(SwinTransformer, model)
        out: Tensor = swin.layers(swin.patch_embed(images))
        return out
    beit = cast(Beit, model)
    x = beit.patch_embed(images)
    x = torch.cat([beit.cls_token.expand(len(x), -1, -1), x], dim=1)
    x = beit.pos_drop(x if beit.pos_embed is None else x + beit.pos_embed)
    bias = None if beit.rel_pos_bias is None else beit.rel_pos_bias()
    for block in beit.blocks:
        x = block(x, shared_rel_pos_bias=bias)
    return cast(Tensor, x)


def take(model: nn.Module, images: Tensor, cls: str, norm: bool = True) -> tuple[Tensor, Tensor]:
    """Class feature (B, D) and patch tokens (B, N, D) of a network for images (B, 3, H, W).

    token: the class token.  pooled: timm's feature before the classifier.  projected: timm's output, for networks with
    a projection.  Patches, and a class token, are taken after the final norm, or as the last block leaves them if
    `norm` is False or the model has none (dBOT-ft). Networks of other families give no patches (N = 0).
    """
    net = cast(Any, model)
    if family(model) == "other":
        x = net.forward_features(images)
        pooled = net.forward_head(x, pre_logits=cls != "projected")
        return pooled, pooled.new_empty(len(pooled), 0, pooled.shape[-1])
    raw = last_tokens(model, images)
    raw = raw.to(_dtype_after_blocks(model) or raw.dtype)
    normed = net.norm(raw)
    tokens = normed if norm else raw
    if tokens.ndim == 4:
        tokens, prefix = tokens.flatten(1, 2), 0
    else:
        prefix = int(net.num_prefix_tokens)
    feature = tokens[:, 0] if cls == "token" else net.forward_head(normed, pre_logits=cls == "pooled")
    return feature, tokens[:, prefix:]


def _parts_after_blocks(model: nn.Module) -> list[nn.Module]:
    parts = [getattr(model, name, None) for name in AFTER_BLOCKS]
    return [part for part in parts if isinstance(part, nn.Module)]


def _dtype_after_blocks(model: nn.Module) -> torch.dtype | None:
    return next((p.dtype for part in _parts_after_blocks(model) for p in part.parameters()), None)


def to_precision(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a network; what follows the last block stays in float32 at least, as norms did under mixed precision."""
    model.to(device=device, dtype=dtype)
    if family(model) != "other":
        for part in _parts_after_blocks(model):
            part.to(torch.promote_types(dtype, torch.float32))
