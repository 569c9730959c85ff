"""What distillation needs of timm's VisionTransformer beyond timm: taps, position tables of any grid, stochastic depth.

The conventions are those of the released UNIC student (a DINOv2-style ViT). A model treated here keeps running under
timm's own forward.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

RELEASED_OFFSET = 0.1
SUBSET_ABOVE = 0.1


def resize_pos_embed(
    table_1ND: Tensor,
    old_grid: tuple[int, int],
    grid: tuple[int, int],
    num_prefix: int,
    offset: float | None = RELEASED_OFFSET,
    antialias: bool = False,
) -> Tensor:
    """Bicubic resampling of a position table to another grid, in float32 or wider; a table of that grid stays as it is.

    Args:
        table_1ND: (1, num_prefix + h*w, D); the first `num_prefix` rows belong to tokens without a place and stay.
        old_grid, grid: (rows, columns) of the table and of the wanted one.
        offset: sampling factors are (new + offset) / old per axis, as in the released models; None = exactly new / old.
        antialias: with offset None: as timm resamples the tables of its weights.

    Returns:
        (1, num_prefix + grid rows * columns, D) in the table's dtype.
    """
    if tuple(grid) == tuple(old_grid):
        return table_1ND
    prefix, places = table_1ND[:, :num_prefix], table_1ND[:, num_prefix:]
    image = places.to(torch.promote_types(places.dtype, torch.float32)).reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    if offset is None:
        image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    else:
        factors = [(new + offset) / old for new, old in zip(grid, old_grid, strict=True)]
        image = F.interpolate(image, scale_factor=factors, mode="bicubic", align_corners=False)
    if tuple(image.shape[-2:]) != tuple(grid):
        raise ValueError(f"position table {old_grid} resampled to {tuple(image.shape[-2:])} instead of {grid}")
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2).to(table_1ND.dtype)], dim=1)


def pos_embed_for(vit: VisionTransformer, grid: tuple[int, int], offset: float | None = RELEASED_OFFSET) -> Tensor:
    """The model's position table for a grid of patches: itself where the grids agree, else resampled."""
    native: tuple[int, int] = tuple(vit.patch_embed.grid_size)
    return resize_pos_embed(cast(Tensor, vit.pos_embed), native, grid, placeless(vit), offset)


def placeless(vit: VisionTransformer) -> int:
    """Rows of a model's position table that belong to class and register tokens."""
    return 0 if vit.no_embed_class else int(vit.num_prefix_tokens)


def fit_pos_embed(vit: VisionTransformer, table_1ND: Tensor) -> Tensor:
    """A table of another square grid for the model's own; a table of no square grid as it is."""
    prefix, native = placeless(vit), cast(Tensor, vit.pos_embed)
    side = math.isqrt(max(table_1ND.shape[1] - prefix, 0))
    if table_1ND.shape == native.shape or side == 0 or prefix + side**2 != table_1ND.shape[1]:
        return table_1ND
    return resize_pos_embed(table_1ND, (side, side), tuple(vit.patch_embed.grid_size), prefix)


def set_grid(vit: VisionTransformer, grid: tuple[int, int], rule: str = "offset") -> None:
    """Give a model a position table for another grid once and for all, instead of resampling it in every pass.

    rule: offset (factors (new + 0.1) / old, as DINOv2) | size (exact factors) | antialias (as timm's own weights).
    """
    native: tuple[int, int] = tuple(vit.patch_embed.grid_size)
    if tuple(grid) == native:
        return
    if vit.pos_embed is not None:
        offset = RELEASED_OFFSET if rule == "offset" else None
        prefix = placeless(vit)
        table = resize_pos_embed(vit.pos_embed.data, native, grid, prefix, offset, antialias=rule == "antialias")
        vit.pos_embed = nn.Parameter(table, requires_grad=vit.pos_embed.requires_grad)
    patch_h, patch_w = vit.patch_embed.patch_size
    vit.patch_embed.set_input_size(img_size=(grid[0] * patch_h, grid[1] * patch_w))


def embed_patches(vit: VisionTransformer, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Images (B, 3, H, W) of any size that the patch size divides -> patch tokens (B, N, D) and their grid."""
    patch_h, patch_w = vit.patch_embed.patch_size
    height, width = images.shape[-2:]
    if height % patch_h or width % patch_w:
        raise ValueError(f"images of {height}x{width} cannot be cut into patches of {patch_h}x{patch_w}")
    tokens: Tensor = vit.patch_embed.norm(vit.patch_embed.proj(images).flatten(2).transpose(1, 2))
    return tokens, (height // patch_h, width // patch_w)


def place(vit: VisionTransformer, x: Tensor, grid: tuple[int, int], offset: float | None = RELEASED_OFFSET) -> Tensor:
    """Patch tokens (B, N, D) -> input tokens of the first block (B, P+N, D): prefix and positions added."""
    prefix = [token.expand(len(x), -1, -1) for token in (vit.cls_token, vit.reg_token) if token is not None]
    table = None if vit.pos_embed is None else pos_embed_for(vit, grid, offset)
    if table is not None and vit.no_embed_class:
        x = torch.cat([*prefix, x + table], dim=1)
    else:
        x = torch.cat([*prefix, x], dim=1)
        x = x if table is None else x + table
    out: Tensor = vit.norm_pre(vit.patch_drop(vit.pos_drop(x)))
    return out


def embed(vit: VisionTransformer, images: Tensor, offset: float | None = RELEASED_OFFSET) -> Tensor:
    """Images (B, 3, H, W) of any size that the patch size divides -> input tokens of the first block (B, P+N, D)."""
    return place(vit, *embed_patches(vit, images), offset)


def as_vit(model: nn.Module) -> VisionTransformer:
    """The same model, known to be timm's VisionTransformer.  Raises TypeError for any other network."""
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"{type(model).__name__} is not timm's VisionTransformer: its block outputs cannot be taken")
    return model


def forward_taps(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Embedding output and every block's output, before the final norm: L+1 tensors (B, P+N, D).

    Grids other than the model's own get an interpolated position table, non-square ones included.
    """
    return list(iterate_taps(model, images))


def iterate_taps(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """The tensors of `forward_taps` one by one: without gradients, earlier ones are freed once they are dropped."""
    vit = as_vit(model)
    x = embed(vit, images)
    yield x
    for block in vit.blocks:
        x = run_block(vit, block, x)
        yield x


def run_block(vit: VisionTransformer, block: nn.Module, x: Tensor) -> Tensor:
    """One block; its inner activations are computed again in the backward pass if the model asks for that."""
    recompute = vit.grad_checkpointing and torch.is_grad_enabled()
    out: Tensor = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
    return out


def drop_rates(rate: float, depth: int) -> list[float]:
    """Stochastic-depth rates of the blocks, linear from 0 to `rate`, rounded to float32 as the release has them."""
    rates: list[float] = torch.linspace(0, rate, depth, dtype=torch.float32, device="cpu").tolist()
    return rates


def residual_scale(branch: Tensor, scale_B: Tensor) -> Tensor:
    """Multiply a residual branch (B, ...) by one factor per sample."""
    return branch * scale_B.to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


class DropPath(nn.Module):
    """Stochastic depth with the two rules of the released UNIC student, for blocks of timm's form x + drop_path(f(x)).

    0 < rate <= 0.1: each sample's branch is kept with probability 1 - rate and scaled by its inverse. rate > 0.1: a
    random subset of max(int(B * (1 - rate)), 1) samples is kept and scaled by B / subset. Rates are rounded to float32,
    where 0.1 lies above 0.1, so the last block of a model at 0.1 uses the subset. Draws come from torch's default
    generator of the device.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = float(np.float32(rate))

    @property
    def rule(self) -> Literal["none", "mask", "subset"]:
        if self.rate <= 0:
            return "none"
        return "subset" if self.rate > SUBSET_ABOVE else "mask"

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """One factor per sample (B,), float64, drawn on the device without a host synchronisation."""
        return self.factors(torch.rand(batch, device=device))

    def factors(self, u_B: Tensor) -> Tensor:
        """The factors (B,) that uniform draws (B,) stand for."""
        batch = len(u_B)
        if self.rule == "subset":
            kept = max(int(batch * (1.0 - self.rate)), 1)
            return (u_B.argsort() < kept).double() * (batch / kept)
        return (u_B < 1.0 - self.rate).double() / (1.0 - self.rate)

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.rule == "none":
            return branch
        return residual_scale(branch, self.draw(len(branch), branch.device))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.4f}, rule={self.rule}"


def set_drop_path(model: nn.Module, rate: float) -> None:
    """Replace timm's stochastic depth in every block by ours, linear from 0 to `rate` over the depth."""
    vit = as_vit(model)
    blocks: Iterable[Any] = vit.blocks
    for block, block_rate in zip(blocks, drop_rates(rate, len(vit.blocks)), strict=True):
        if not hasattr(block, "drop_path1"):
            raise TypeError(f"{type(block).__name__} has no two residual branches to drop: use a model of plain blocks")
        block.drop_path1, block.drop_path2 = DropPath(block_rate), DropPath(block_rate)
