"""Fused attention with relative-position biases for timm's Beit and SwinTransformerV2, in place and under their names.

The scores never exist as a tensor of their own, biases are laid out as the kernels want them, and nothing depends on
the precision of buffers, which an engine may leave in float32.
"""

from __future__ import annotations

import math
from typing import cast

import timm.models.beit as beit
import timm.models.swin_transformer_v2 as swin
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.models.rel_pos import SharedBias, index_for, relative_bias

MOST_SCALE = math.log(100.0)  # of cosine attention
SIGMOID_SCALE = 16.0  # biases of SwinV2 lie between 0 and this


class _Fused(nn.Module):
    """Parameters of a timm attention without bias on its keys; forward is the heirs'."""

    def __init__(self, own: beit.Attention | swin.WindowAttention) -> None:
        super().__init__()
        self.num_heads, self.dropout = own.num_heads, own.attn_drop.p
        self.qkv, self.proj, self.proj_drop = own.qkv, own.proj, own.proj_drop
        self.q_bias, self.v_bias = own.q_bias, own.v_bias

    def external_parameters(self) -> list[nn.Parameter]:
        """Read without calling the layer that owns it."""
        return [self.qkv.get_parameter("weight")]

    def split(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, H, N, d)."""
        batch, tokens, _ = x_BNC.shape
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BNC, self.qkv.weight, bias)
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def join(self, heads_BHNd: Tensor) -> Tensor:
        out: Tensor = self.proj_drop(self.proj(heads_BHNd.transpose(1, 2).flatten(2)))
        return out


class BiasedAttention(_Fused):
    """Beit's: softmax(q k / sqrt(d) + own bias + shared bias) v."""

    def __init__(self, own: beit.Attention) -> None:
        super().__init__(own)
        self.scale = own.scale
        self.relative_position_bias_table = own.relative_position_bias_table
        if own.window_size is not None:
            rows, columns = own.window_size
            index = index_for(own.relative_position_bias_table, (rows, columns))
            self.register_buffer("index", index, persistent=False)

    def own_bias(self) -> Tensor | None:
        """(H, N, N) of this block's table, if it has one."""
        if self.relative_position_bias_table is None:
            return None
        return relative_bias(self.relative_position_bias_table, self.get_buffer("index"))

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        bias = self.own_bias()
        if shared_rel_pos_bias is not None:
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        dropout = self.dropout if self.training else 0.0
        return self.join(F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=self.scale))


class StageBias(nn.Module):
    """One network of offsets for all windows of a SwinV2's stage. forward: () -> 16 sigmoid(MLP(offset)) (H, N, N)."""

    def __init__(self, own: swin.WindowAttention) -> None:
        super().__init__()
        self.cpb_mlp = own.cpb_mlp
        self.register_buffer("relative_coords_table", own.get_buffer("relative_coords_table"), persistent=False)
        self.register_buffer("index", own.get_buffer("relative_position_index"), persistent=False)

    def forward(self) -> Tensor:
        coords = self.get_buffer("relative_coords_table").flatten(0, 2)
        return _offset_bias(self.cpb_mlp, coords, self.get_buffer("index"))


class CosineAttention(_Fused):
    """SwinV2's: cosines of queries and keys times a learnt scale, plus 16 sigmoid(MLP(offset)); in float32 or wider."""

    def __init__(self, own: swin.WindowAttention, shared: StageBias | None = None) -> None:
        """shared: the stage's biases, where the block has none of its own."""
        super().__init__(own)
        self.logit_scale = own.logit_scale
        self.shared = (shared,)  # in a tuple, as its weights belong to the stage
        if shared is None:
            self.cpb_mlp = own.cpb_mlp
            self.register_buffer("coords", own.get_buffer("relative_coords_table").flatten(0, 2), persistent=False)
            self.register_buffer("index", own.get_buffer("relative_position_index"), persistent=False)

    def bias(self) -> Tensor:
        """(H, N, N) of the window's offsets."""
        (shared,) = self.shared
        if shared is not None:
            return cast(Tensor, shared())
        return _offset_bias(self.cpb_mlp, self.get_buffer("coords"), self.get_buffer("index"))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B * windows, N, C).  mask: (windows, N, N), added to the scores, or None."""
        q, k, v = (_wide(part) for part in self.split(x))
        scale = _wide(self.logit_scale).clamp(max=MOST_SCALE).exp()  # (H, 1, 1)
        bias = self.bias()
        if mask is not None:
            bias = bias + mask.to(bias.dtype).unsqueeze(1)  # (windows, H, N, N)
            bias = bias.repeat(len(x) // len(mask), 1, 1, 1)
        dropout = self.dropout if self.training else 0.0
        q = F.normalize(q, dim=-1) * scale
        heads = F.scaled_dot_product_attention(q, F.normalize(k, dim=-1), v, bias, dropout, scale=1.0)
        return self.join(heads.to(x.dtype))


def _offset_bias(network: nn.Module, coords: Tensor, index_NN: Tensor) -> Tensor:
    table = network(coords.to(next(network.parameters()).dtype))
    return relative_bias(SIGMOID_SCALE * _wide(table).sigmoid(), index_NN)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fuse_attention(model: nn.Module) -> None:
    """Replace every attention of a Beit or SwinTransformerV2; weights, names and results stay. Others stay alone."""
    for parent in [*model.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, beit.Attention):
                setattr(parent, name, BiasedAttention(child))
            elif isinstance(child, swin.WindowAttention):
                setattr(parent, name, CosineAttention(child))
            elif isinstance(child, beit.RelativePositionBias):
                setattr(parent, name, SharedBias.of(child))
