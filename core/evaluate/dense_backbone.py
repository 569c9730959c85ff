"""The ViT of dense prediction: blocks with a relative position bias, and a feature map for each of some blocks.

Proteus, sections 9.3 and 9.4 of its notes (BEiT's backbone in mmsegmentation, whose names it has).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.vit import resize_pos_embed

LN_EPS = 1e-6
PREFIX_ROWS = 3  # of a table of relative positions: class to patch, patch to class, class to class
RULES = [
    (r"^patch_embed\.proj\.", "patch_embed.projection."), (r"^blocks\.", "layers."), (r"\.norm([12])\.", r".ln\1."),
    (r"\.ls([12])\.gamma$", r".gamma_\1"), (r"\.mlp\.fc1\.", ".ffn.layers.0.0."), (r"\.mlp\.fc2\.", ".ffn.layers.1."),
]  # fmt: skip


class Maps(NamedTuple):
    """Of one block: patch tokens as a map (B, D, h, w) and the class token (B, D), neither of them normed."""

    patch: Tensor
    cls: Tensor


class Loaded(NamedTuple):
    missing: list[str]  # start as they are: tables of relative positions
    unexpected: list[str]  # have no place in the backbone: final norm, mask token


def to_dense(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's weights from timm's (and DINOv2's) names to those of the dense backbone."""
    out = {}
    for key, value in state.items():
        for pattern, replacement in RULES:
            key = re.sub(pattern, replacement, key)
        out[key] = value
    return out


def relative_index(grid: tuple[int, int]) -> Tensor:
    """(1 + N, 1 + N) rows of a table of (2h - 1)(2w - 1) + 3: one for each offset between patches of a grid."""
    height, width = grid
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    down = rows[:, None] - rows + height - 1
    right = columns[:, None] - columns + width - 1
    offsets = (2 * height - 1) * (2 * width - 1)
    index = torch.empty(1 + height * width, 1 + height * width, dtype=torch.int64)
    index[1:, 1:] = down * (2 * width - 1) + right
    index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class RelativeAttention(nn.Module):
    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.heads = heads
        rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + PREFIX_ROWS
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.register_buffer("relative_position_index", relative_index(grid))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).contiguous())
        return cast(Tensor, self.proj(out.transpose(1, 2).reshape(x.shape)))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(dim, hidden), nn.GELU()), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layers(x))


class Layer(nn.Module):
    def __init__(self, dim: int, hidden: int, heads: int, grid: tuple[int, int], drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.ln1, self.attn = nn.LayerNorm(dim, eps=LN_EPS), RelativeAttention(dim, heads, grid)
        self.ln2, self.ffn = nn.LayerNorm(dim, eps=LN_EPS), FeedForward(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._dropped(self.gamma_1 * self.attn(self.ln1(x)))
        return x + self._dropped(self.gamma_2 * self.ffn(self.ln2(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return branch
        keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_path
        return branch * keep / (1 - self.drop_path)


class DenseBackbone(nn.Module):
    """ViT for images of one size, (B, 3, S, S) -> `Maps` of the blocks asked for; there is no final norm.

    Args:
        grid: patches of an image, (rows, columns).
        out_indices: blocks whose outputs are returned, in order.
        drop_path: rate of the last block, linear from 0.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, hidden: int, patch: int, grid: tuple[int, int],
        out_indices: Sequence[int], drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid, self.out_indices = grid, tuple(out_indices)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.patch_embed = nn.ModuleDict({"projection": nn.Conv2d(3, dim, patch, patch)})
        rates: Iterable[float] = torch.linspace(0, drop_path, depth).tolist()
        self.layers = nn.ModuleList(Layer(dim, hidden, heads, grid, rate) for rate in rates)

    def forward(self, images: Tensor) -> list[Maps]:
        x = self.patch_embed["projection"](images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        found = {}
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.out_indices:
                found[i] = Maps(x[:, 1:].mT.unflatten(2, self.grid), x[:, 0])
        return [found[i] for i in self.out_indices]

    def load_vit(self, state: Mapping[str, Tensor], old_grid: tuple[int, int]) -> Loaded:
        """Take over a ViT in timm's names whose position table is one of `old_grid`; it is resampled to this size.

        The rule is plain bicubic by size, without the offset of the released teachers.  Layers without layer scale
        keep factors of 1.  Raises ValueError for weights that are missing beside the tables of relative positions.
        """
        given = to_dense(state)
        given["pos_embed"] = resize_pos_embed(given["pos_embed"], old_grid, self.grid, 1, offset=None)
        result = self.load_state_dict(given, strict=False)
        lost = [key for key in result.missing_keys if "relative_position" not in key and ".gamma_" not in key]
        odd = [key for key in result.unexpected_keys if key not in ("mask_token", "norm.weight", "norm.bias")]
        if lost or odd:
            raise ValueError(
                f"dense backbone: missing {', '.join(lost) or 'none'}; unexpected {', '.join(odd) or 'none'}"
            )
        return Loaded(list(result.missing_keys), list(result.unexpected_keys))
