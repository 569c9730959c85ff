from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from core.config import ConfigError
from core.models.features import take
from core.models.fused import fuse_attention
from core.models.init import init_student
from core.models.layouts.windowed import from_beit
from core.models.students import build_arguments, create, describe
from core.models.variants import own_arguments
from core.models.weights import load_strict
from tests.core.models.drawn import network

BEIT, SWINV2, VIT = "beit_base_patch16_224", "swinv2_base_window8_256", "vit_tiny_patch16_224"
PATCHES: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2, "init_values": 0.1,
    "use_fc_norm": False, "class_token": False,
}  # fmt: skip
TABLES = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True}
STAGES: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_arguments_that_are_not_timm_s_are_known_for_the_networks_that_have_them() -> None:
    args = {"norm_eps": 1e-5, "class_token": False, "depth": 2, "rpe_hidden": 16}
    assert own_arguments(BEIT, args) == {"norm_eps": 1e-5, "class_token": False}
    assert own_arguments(VIT, args) == {"norm_eps": 1e-5}  # timm's ViT takes a class_token of its own
    assert build_arguments(BEIT, {"class_token": False, "depth": 2}, None) == {"depth": 2}
    with pytest.raises(ConfigError, match="rpe_hidden"):
        create(BEIT, {"rpe_hidden": 16}, 224, "student")


def test_a_beit_without_class_token_has_patches_alone_and_no_rows_for_another_token() -> None:
    model = network(BEIT, PATCHES | TABLES)
    info = describe(model, BEIT, 32, "student")
    assert (info.prefix, info.has_cls, info.grid) == (0, False, (4, 4))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert "cls_token" not in shapes
    assert shapes["pos_embed"] == (1, 16, 12)
    assert {shapes[name] for name in shapes if name.endswith("bias_table")} == {(49, 2)}
    pooled, patches = take(model, IMAGES, "pooled")
    assert torch.equal(patches, model.forward_features(IMAGES))
    assert torch.allclose(pooled, patches.mean(1))


def test_patches_see_each_other_as_beside_a_class_token_that_nothing_attends_to() -> None:
    """With a class token whose logits are far below all others, patches have the same features."""
    alone, beside = network(BEIT, PATCHES | TABLES), network(BEIT, PATCHES | TABLES | {"class_token": True})
    state = alone.state_dict()
    for name, value in beside.state_dict().items():
        if name.endswith("bias_table"):
            state[name] = torch.cat([state[name], torch.full((3, 2), -1e4, dtype=torch.float64)])
        elif name == "pos_embed":
            state[name] = torch.cat([value[:, :1], state[name]], dim=1)
        elif name == "cls_token":
            state[name] = value
    beside.load_state_dict(state)
    assert torch.allclose(beside.forward_features(IMAGES)[:, 1:], alone.forward_features(IMAGES), atol=1e-9)


def test_the_absent_token_neither_trains_nor_changes_precision() -> None:
    model = network(BEIT, PATCHES | TABLES)
    assert init_student(model)
    assert model.pos_embed.detach().abs().max() <= 0.02, "cut off at one deviation, as all that is drawn"
    assert model.bfloat16()(IMAGES.bfloat16()).dtype == torch.bfloat16
    assert "cls_token" not in dict(model.named_parameters())


def test_a_class_token_that_is_not_there_cannot_be_the_pooled_feature() -> None:
    with pytest.raises(ConfigError, match="global_pool token needs the class token"):
        create(BEIT, PATCHES | {"global_pool": "token"}, None, "student")


def test_one_bias_network_per_stage_gives_what_copies_of_it_in_every_block_give() -> None:
    shared, copies = network(SWINV2, STAGES | {"use_shared_rel_pos_bias": True}), network(SWINV2, STAGES)
    state = shared.state_dict()
    for name in copies.state_dict():
        stage, _, rest = name.partition(".blocks.")
        if ".cpb_mlp." in name:
            state[name] = state[f"{stage}.rel_pos_bias.{rest.partition('.attn.')[2]}"]
    copies.load_state_dict({name: value for name, value in state.items() if ".rel_pos_bias." not in name})
    fuse_attention(copies)
    assert torch.allclose(shared(IMAGES), copies(IMAGES), atol=1e-12)
    for model in (shared, copies):
        model(IMAGES).square().sum().backward()
    gradients = [dict(model.named_parameters()) for model in (shared, copies)]
    of_blocks = sum(gradients[1][f"layers.0.blocks.{i}.attn.cpb_mlp.0.weight"].grad for i in range(2))
    assert torch.allclose(gradients[0]["layers.0.rel_pos_bias.cpb_mlp.0.weight"].grad, of_blocks, atol=1e-9)


def test_a_copy_of_a_network_with_shared_biases_has_its_own() -> None:
    model = network(SWINV2, STAGES | {"use_shared_rel_pos_bias": True})
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[0].rel_pos_bias.cpb_mlp[2].weight.zero_()
    assert not torch.equal(other(IMAGES), model(IMAGES))


def test_bias_networks_have_the_width_asked_for() -> None:
    model = network(SWINV2, STAGES | {"rpe_hidden": 16})
    assert model.layers[1].blocks[0].attn.cpb_mlp[2].weight.shape == (4, 16)


def test_biases_of_keys_are_dropped_from_a_file_as_they_change_nothing() -> None:
    args = {key: value for key, value in PATCHES.items() if key != "class_token"} | {"global_pool": "token"}
    model = network(BEIT, args | {"use_shared_rel_pos_bias": True})
    before = model(IMAGES)
    file = model.state_dict() | {f"blocks.{i}.attn.k_bias": torch.randn(12).double() for i in range(2)}
    load_strict(model, file)
    assert torch.equal(model(IMAGES), before)
    assert "blocks.0.attn.k_bias" not in from_beit(file)
    for block in model.blocks:  # timm's own has a place for it
        block.attn.k_bias.copy_(torch.randn(12))
    assert torch.allclose(model(IMAGES), before, atol=1e-9)
