"""A ViT whose patch tokens are read at sampled or interpolated positions (UDI, stratified random sampling)."""

from __future__ import annotations

from collections import deque
from typing import cast

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.models.vit import as_vit, iterate_taps

LN_EPS = 1e-6
TOKEN_STD = 0.02


def dense_maps(index: Tensor, weight: Tensor, tokens: int) -> Tensor:
    """Sparse positions as maps: tokens and their weights (..., s, P) -> (..., s, tokens), float32 or wider.

    The P tokens of a position differ, so nothing is added up and the result is the same on every device.
    """
    return weight.new_zeros(*weight.shape[:-1], tokens).scatter_(-1, index, weight)


class SampledAttention(nn.Module):
    """Attention whose queries are the queries of all tokens, read at given positions; names as released.

    x (B, N, D) and maps (B, M, N) -> LayerNorm(proj(attention(maps q, k, v)) + maps x), (B, M, D). Rows of a map sum to
    1, which carries the bias of q, or are all zero, which leaves every score at 0: uniform attention.
    """

    def __init__(self, dim: int, heads: int, skip: bool = True) -> None:
        super().__init__()
        self.heads, self.skip = heads, skip
        self.qkv, self.proj, self.norm = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.LayerNorm(dim, eps=LN_EPS)
        for layer in (self.qkv, self.proj):
            nn.init.normal_(layer.weight, std=TOKEN_STD)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, maps: Tensor) -> Tensor:
        maps = maps.to(x.dtype)
        mixed = F.scaled_dot_product_attention(*self._heads(x, maps)).transpose(1, 2).flatten(2)
        out = self.proj(mixed)
        return cast(Tensor, self.norm(out + maps @ x if self.skip else out))

    def attention(self, x: Tensor, maps: Tensor) -> Tensor:
        """Attention of every head, to look at: (B, heads, M, N); zero where a row of the map is empty."""
        maps = maps.to(x.dtype)
        q, k, _ = self._heads(x, maps)
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        return torch.softmax(scores, dim=-1) * (maps.sum(-1) > 0)[:, None, :, None]

    def _heads(self, x: Tensor, maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (maps @ q, k, v))
        return q, k, v


class SampledBackbone(nn.Module):
    """ViT, sampled attention and the norm in front of it, under the released names backbone, attn, norm1.

    All class tokens of the ViT become one parameter (1, P, D) with a position each, as released: it is clipped as one.
    """

    def __init__(self, vit: nn.Module, heads: int) -> None:
        super().__init__()
        model = as_vit(vit)
        join_class_tokens(model)
        self.backbone = model
        self.attn, self.norm1 = SampledAttention(model.embed_dim, heads), nn.LayerNorm(model.embed_dim, eps=LN_EPS)

    def external_parameters(self) -> list[nn.Parameter]:
        """Tokens and position table, read without calling the ViT's own forward."""
        return [p for p in self.backbone.parameters(recurse=False) if p.requires_grad]

    def forward(self, images: Tensor, maps: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) and maps (B, M, N) -> normed class tokens (B, P, D) and sampled patches (B, M, D).

        The patches come from the last block's output before the final norm; without maps there are none.
        """
        vit, x = self.backbone, last_block(self.backbone, images)
        prefix = vit.num_prefix_tokens
        patches = None if maps is None else self.attn(self.norm1(x[:, prefix:]), maps)
        return vit.norm(x[:, :prefix]), patches


def last_block(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Tokens (B, P+N, D) behind the last block, before the final norm."""
    return deque(iterate_taps(vit, images), maxlen=1)[0]


@torch.no_grad()
def join_class_tokens(vit: VisionTransformer) -> None:
    """Class and register tokens as one parameter `cls_token`."""
    if vit.cls_token is not None and vit.reg_token is not None:
        vit.cls_token, vit.reg_token = nn.Parameter(torch.cat([vit.cls_token, vit.reg_token], dim=1)), None


def split_class_tokens(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for the weights of such a ViT: the first class token, and the others as registers."""
    tokens = state["cls_token"]
    return (
        state
        | {"cls_token": tokens[:, :1].clone()}
        | ({"reg_token": tokens[:, 1:].clone()} if tokens.shape[1] > 1 else {})
    )
