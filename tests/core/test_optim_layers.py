from __future__ import annotations

import torch
from torch import nn

from core.optim_lars import Lars
from core.optim_layers import LayerIds, bias_groups

NAMES = ["pos_embed", "cls_token", "blocks.0.attn.relative_position_bias_table", "blocks.0.norm.weight",
         "layers.0.blocks.0.attn.cpb_mlp.0.weight", "layers.0.blocks.0.attn.logit_scale",
         "decoder.0.weight"]  # fmt: skip


def test_tables_of_a_vit_and_projectors_are_decayed_and_a_swins_bias_network_is_not() -> None:
    named = [(f"encoder.{name}", nn.Parameter(torch.zeros(() if "norm" in name else (2, 2)))) for name in NAMES]
    decayed, free = bias_groups(named, 0.05)
    assert decayed["names"] == ["encoder.blocks.0.attn.relative_position_bias_table", "encoder.decoder.0.weight"]
    assert len(free["names"]) == 5
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)


def test_layers_count_from_the_embeddings_to_the_final_norm() -> None:
    layer = LayerIds(["cls_token", "blocks.0.x", "blocks.1.x", "norm.weight"])
    assert layer.count == 4
    names = ("cls_token", "patch_embed.proj.bias", "blocks.0.x", "blocks.1.x", "norm.weight", "rel_pos_bias.table")
    assert [layer(n) for n in names] == [0, 0, 1, 2, 3, 3]


def test_blocks_of_a_swin_are_numbered_through() -> None:
    layer = LayerIds([f"layers.{s}.blocks.{b}.x" for s in (0, 1) for b in (0, 1)])
    assert [layer(f"layers.{s}.blocks.{b}.x") for s in (0, 1) for b in (0, 1)] == [1, 2, 3, 4]
    assert layer("layers.1.downsample.norm.bias") == 2


def test_lars_moves_a_weight_by_a_share_of_its_own_length_and_a_bias_plainly() -> None:
    weight, bias = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.tensor([1.0]))
    optimiser = Lars([weight, bias], 1.0, weight_decay=0.5, trust=0.01)
    weight.grad, bias.grad = torch.eye(2) * 1e6, torch.tensor([0.25])
    optimiser.step()
    assert abs((weight - 3.0).norm().item() - 0.01 * 6.0) < 1e-5
    assert bias.item() == 0.75, "neither decayed nor rescaled"
    optimiser.step()
    assert abs(bias.item() - (0.75 - (0.9 * 0.25 + 0.25))) < 1e-6


def test_lars_steps_plainly_from_a_weight_of_zero() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    Lars([weight], 0.1).step()
    assert torch.equal(weight.detach(), torch.full((2, 2), -0.1))
