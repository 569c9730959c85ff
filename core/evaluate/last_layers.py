"""What the DINO family's evaluations read from a ViT's last blocks: normed outputs, class features, attention."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import torch
from torch import Tensor

from core.models.vit import as_vit, iterate_taps


def last_layers(model: torch.nn.Module, images: Tensor, count: int) -> list[Tensor]:
    """Outputs of the last `count` blocks, each through the final norm, first to last: (B, P+N, D) each."""
    vit = as_vit(model)
    return [vit.norm(x) for x in deque(iterate_taps(vit, images), maxlen=count)]


def feature_maps(model: torch.nn.Module, images: Tensor, count: int) -> list[Tensor]:
    """Patch tokens of `last_layers` as maps (B, D, h, w), which dense heads read: images (B, 3, H, W)."""
    vit = as_vit(model)
    height, width = (side // patch for side, patch in zip(images.shape[-2:], vit.patch_embed.patch_size, strict=True))
    layers = last_layers(model, images, count)
    return [x[:, vit.num_prefix_tokens :].mT.reshape(len(x), -1, height, width) for x in layers]


def class_features(model: torch.nn.Module, images: Tensor, count: int, patch_mean: bool = False) -> Tensor:
    """First class tokens of the last `count` blocks side by side: (B, count D).

    patch_mean: with the mean of the last layer's patch tokens interleaved channel by channel, (B, 2 count D), for
    count 1 alone, as released. Patches begin behind all class and register tokens.
    """
    vit, layers = as_vit(model), last_layers(model, images, count)
    classes = torch.cat([x[:, 0] for x in layers], dim=-1)
    if not patch_mean:
        return classes
    if count != 1:
        raise ValueError(f"the mean of patches is defined for one block, not {count}: use count 1")
    patches = layers[-1][:, vit.num_prefix_tokens :].mean(1)
    return torch.stack([classes, patches], dim=-1).flatten(1)


def last_attention(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Attention of the last block: (B, heads, P+N, P+N)."""
    vit = as_vit(model)
    x, _ = deque(iterate_taps(vit, images), maxlen=2)
    block = cast(Any, vit.blocks[-1])
    attention = block.attn
    qkv = attention.qkv(block.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    out: Tensor = (q * attention.scale @ k.transpose(-2, -1)).softmax(-1)
    return out
