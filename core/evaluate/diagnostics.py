"""What attention heads look at: distance, diversity and mean maps, summed up over images (arXiv 2205.14141, section 4).

Maps A (B, H, N, N) are post-softmax, of one layer, tokens in row-major order behind `prefix` class and register tokens.
Definitions: Feature-Distillation notes, section 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def patch_distances(grid: tuple[int, int], patch_px: float) -> Tensor:
    """Distances in pixels between patches, (N, N) float64."""
    rows, columns = grid
    place = torch.arange(rows * columns)
    at = torch.stack([place // columns, place % columns], 1).double()
    return patch_px * torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")


def among_patches(attn_BHNN: Tensor, prefix: int, renormalise: bool) -> Tensor:
    """Rows and columns of patches, float64; renormalise: each row sums to one again."""
    a = attn_BHNN[..., prefix:, prefix:].double()
    return a / a.sum(-1, keepdim=True) if renormalise else a


def attention_distance(attn_BHNN: Tensor, distances_PP: Tensor, prefix: int = 1, renormalise: bool = True) -> Tensor:
    """Mean over images and queries of sum_j A_ij D_ij in pixels: (H,).  A uniform 14x14 map of 16 px gives 116.5."""
    a = among_patches(attn_BHNN, prefix, renormalise)
    return (a * distances_PP.to(a.device)).sum(-1).mean((0, 2))


def head_cosine(attn_BHNN: Tensor, prefix: int = 1, whole: bool = False) -> Tensor:
    """Mean cosine over head pairs and images, 0-dimensional; low means diverse heads.

    Between the heads' rows of one query, averaged over queries, or (whole) between the flattened maps.
    """
    a = among_patches(attn_BHNN, prefix, renormalise=False)
    vectors = a.flatten(2).unsqueeze(2) if whole else a  # (B, H, queries, keys)
    vectors = nn.functional.normalize(vectors, dim=-1, eps=0.0)
    cosine_BQHH = torch.einsum("bhqk,bgqk->bqhg", vectors, vectors)
    first, second = torch.triu_indices(a.shape[1], a.shape[1], offset=1, device=a.device)
    return cosine_BQHH[..., first, second].mean()


def mean_map(attn_BHNN: Tensor, prefix: int = 1) -> Tensor:
    """Image average of the maps among patches, (H, P, P)."""
    return among_patches(attn_BHNN, prefix, renormalise=False).mean(0)


def diagonal_score(map_HPP: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean mass on the query's own patch and its eight neighbours, (H,)."""
    place = torch.arange(grid[0] * grid[1])
    rows, columns = place // grid[1], place % grid[1]
    near = ((rows[:, None] - rows).abs() <= 1) & ((columns[:, None] - columns).abs() <= 1)
    return (map_HPP * near.to(map_HPP.device)).sum(-1).mean(-1)


def column_score(map_HPP: Tensor) -> Tensor:
    """How unevenly keys are attended to: deviation over keys of their mean mass, times the number of patches, (H,)."""
    return map_HPP.mean(-2).std(-1, correction=0) * map_HPP.shape[-1]


class Diagnostics:
    """Running means of one layer: maps are added image batch by image batch and never kept."""

    def __init__(self, grid: tuple[int, int], patch_px: float, prefix: int = 1) -> None:
        self.grid, self.prefix, self.images = grid, prefix, 0
        self.distances = patch_distances(grid, patch_px)
        self.sums: dict[str, Tensor] = {}

    def add(self, attn_BHNN: Tensor) -> None:
        found = {
            "distance": attention_distance(attn_BHNN, self.distances, self.prefix),
            "distance_unnormalised": attention_distance(attn_BHNN, self.distances, self.prefix, renormalise=False),
            "head_cosine_rows": head_cosine(attn_BHNN, self.prefix),
            "head_cosine_maps": head_cosine(attn_BHNN, self.prefix, whole=True),
            "mean_map": mean_map(attn_BHNN, self.prefix),
        }
        self.images += len(attn_BHNN)
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value * len(attn_BHNN)

    def results(self) -> dict[str, Tensor]:
        """Means over all images, and the two scores of the mean map.  Raises ValueError before the first image."""
        if not self.images:
            raise ValueError("no attention maps were added: give at least one image")
        means = {name: total / self.images for name, total in self.sums.items()}
        return means | {
            "diagonal": diagonal_score(means["mean_map"], self.grid), "column": column_score(means["mean_map"])
        }  # fmt: skip


@torch.no_grad()
def attention_of(attention: Any, x_BNC: Tensor, bias: Tensor | None = None) -> Tensor:
    """Post-softmax map (B, H, N, N) float32 of a timm Attention of a ViT or Beit for its input."""
    batch, tokens, _ = x_BNC.shape
    qkv = attention.qkv(x_BNC)
    if getattr(attention, "q_bias", None) is not None:  # Beit's keys have no bias
        qkv = qkv + torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    q, k, _ = qkv.reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).float().unbind(0)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    scores = q @ k.mT * attention.scale
    if getattr(attention, "relative_position_bias_table", None) is not None:
        fused = hasattr(attention, "own_bias")
        scores = scores + (attention.own_bias() if fused else attention._get_rel_pos_bias())
    maps: Tensor = (scores if bias is None else scores + bias).softmax(-1)
    return maps


@contextmanager
def watched(model: Any, layers: list[Diagnostics]) -> Iterator[None]:
    """Within it, every forward pass of a timm ViT or Beit adds its maps to `layers`, one per block."""

    def hook(own: Diagnostics) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            own.add(attention_of(module, inputs[0], named.get("shared_rel_pos_bias")))

        return add

    blocks: Iterable[Any] = model.blocks
    handles = [
        block.attn.register_forward_pre_hook(hook(own), with_kwargs=True)
        for block, own in zip(blocks, layers, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
