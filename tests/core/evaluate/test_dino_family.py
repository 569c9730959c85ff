"""What is read from a ViT's last blocks, attention masks, and label propagation."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from core.evaluate.attention_masks import attention_masks
from core.evaluate.davis import neighbourhood, propagate, stretch
from core.evaluate.last_layers import class_features, last_attention, last_layers


@pytest.fixture
def vit() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(16, 8, embed_dim=12, depth=3, num_heads=2, num_classes=0, reg_tokens=1, init_values=0.1)
    return model.eval()


def test_the_last_of_the_last_layers_is_the_network_s_own_output(vit: VisionTransformer) -> None:
    x = torch.randn(2, 3, 16, 16)
    layers = last_layers(vit, x, 2)
    assert [tuple(layer.shape) for layer in layers] == [(2, 6, 12)] * 2
    torch.testing.assert_close(layers[-1], vit.forward_features(x))
    assert class_features(vit, x, 2).equal(torch.cat([layer[:, 0] for layer in layers], dim=1))


def test_the_mean_of_patches_is_interleaved_and_leaves_registers_out(vit: VisionTransformer) -> None:
    x = torch.randn(2, 3, 16, 16)
    found, last = class_features(vit, x, 1, patch_mean=True), last_layers(vit, x, 1)[0]
    assert found[:, ::2].equal(last[:, 0])
    assert found[:, 1::2].equal(last[:, 2:].mean(1))
    with pytest.raises(ValueError, match="count 1"):
        class_features(vit, x, 2, patch_mean=True)


def test_the_last_attention_is_a_distribution_that_gives_the_block_s_output(vit: VisionTransformer) -> None:
    x = torch.randn(2, 3, 16, 16)
    attention = last_attention(vit, x)
    assert attention.shape == (2, 2, 6, 6)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 2, 6))
    before = vit.blocks[:-1](vit._pos_embed(vit.patch_embed(x)))
    block = vit.blocks[-1]
    v = block.attn.qkv(block.norm1(before)).unflatten(-1, (3, 2, 6))[:, :, 2].transpose(1, 2)
    out = before + block.ls1(block.attn.proj((attention @ v).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(out + block.ls2(block.mlp(block.norm2(out))), block(before))


def test_a_mask_keeps_the_fewest_patches_with_the_mass() -> None:
    attention = torch.tensor([[0.2, 0.2, 0.05, 0.5, 0.25, 0.2]])  # two class tokens in front
    mask, heat = attention_masks(attention, 2, 3, 0.7)
    assert mask.shape == heat.shape == (1, 6, 6)
    assert mask[0, ::3, ::3].tolist() == [[False, True], [True, False]]
    assert mask[0, :3, 3:].all()
    assert heat[0, 0, 3] == 0.5


def test_labels_travel_to_the_most_similar_place_nearby() -> None:
    labels = torch.eye(6).view(1, 6, 2, 3)  # every place has its own label
    context = torch.eye(6).unsqueeze(0)
    moved = torch.eye(6)[[5, 1, 2, 3, 4, 0]]  # what was in one corner is in the other now
    anywhere = propagate(moved, context, labels, topk=1, radius=0)
    assert anywhere.flatten(1).argmax(0).tolist() == [5, 1, 2, 3, 4, 0]
    nearby = propagate(moved, context, labels, topk=1, radius=1)
    assert nearby.flatten(1).argmax(0).tolist()[1:5] == [1, 2, 3, 4]
    assert nearby[5, 0, 0] == 0  # two columns away
    torch.testing.assert_close(nearby.sum(0), torch.ones(2, 3))


def test_neighbours_are_at_most_that_many_rows_and_columns_apart() -> None:
    near = neighbourhood(3, 4, 1)
    assert near.equal(near.T)
    assert near.sum(1).view(3, 4).tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]


def test_labels_are_stretched_where_they_are_anywhere() -> None:
    found = stretch(torch.tensor([[[0.2, 0.4]], [[0.0, 0.0]]]))
    torch.testing.assert_close(found, torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]]))
