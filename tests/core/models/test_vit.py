from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

from core.models import vit as vits
from core.models.vit import DropPath
from tests.host_syncs import HostSyncs

torch.set_num_threads(1)


def tiny(**settings: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        **{"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0} | settings
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def images(height: int = 16, width: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(5))


KINDS_OF_VIT = {
    "plain": {},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "deit3": {"no_embed_class": True, "init_values": 0.1},
    "clip": {"pre_norm": True},
    "averaged": {"global_pool": "avg"},
    "no class token": {"class_token": False, "global_pool": "avg"},
}


@pytest.mark.parametrize("settings", KINDS_OF_VIT.values(), ids=KINDS_OF_VIT.keys())
def test_the_last_tap_under_the_final_norm_is_what_timm_computes(settings) -> None:
    model = tiny(**settings).eval()
    taps = vits.forward_taps(model, images())
    assert len(taps) == 4
    assert torch.allclose(model.norm(taps[-1]), model.forward_features(images()), atol=1e-6)


def test_taps_are_the_outputs_of_successive_blocks() -> None:
    model = tiny().eval()
    taps = vits.forward_taps(model, images())
    for block, before, after in zip(model.blocks, taps, taps[1:], strict=False):
        assert torch.equal(block(before), after)


@pytest.mark.parametrize("settings", [{}, {"reg_tokens": 2, "no_embed_class": True}])
@pytest.mark.parametrize("size", [(24, 24), (20, 32), (8, 8), (8, 32)])
def test_images_of_other_grids_get_a_resampled_table(size, settings) -> None:
    model = tiny(**settings).eval()
    taps = vits.forward_taps(model, images(*size))
    assert taps[-1].shape == (2, model.num_prefix_tokens + size[0] * size[1] // 16, 24)


def test_a_grid_with_as_many_patches_but_another_shape_does_not_get_the_table_as_it_is() -> None:
    model = tiny()
    assert vits.pos_embed_for(model, (4, 4)) is model.pos_embed
    assert not torch.allclose(vits.pos_embed_for(model, (2, 8)), model.pos_embed)


def test_released_rule_samples_at_an_offset_and_the_exact_rule_does_not() -> None:
    table = torch.randn(1, 1 + 16, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vits.resize_pos_embed(table, (4, 4), (4, 4), 1), table)
    exact = vits.resize_pos_embed(table, (4, 4), (6, 6), 1, offset=None)
    released = vits.resize_pos_embed(table, (4, 4), (6, 6), 1)
    image = table[:, 1:].reshape(1, 4, 4, 3).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(image, scale_factor=(6.1 / 4, 6.1 / 4), mode="bicubic")
    assert torch.allclose(released[:, 1:], want.permute(0, 2, 3, 1).reshape(1, 36, 3))
    assert 1e-3 < (exact - released).abs().max() < 1
    assert torch.equal(exact[:, :1], table[:, :1])


def test_the_table_is_resampled_in_float32_and_given_back_in_its_own_type() -> None:
    table = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = vits.resize_pos_embed(table, (4, 4), (6, 6), 0)
    assert torch.equal(got, vits.resize_pos_embed(table.float(), (4, 4), (6, 6), 0).bfloat16())


def test_images_that_patches_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match="18x16 cannot be cut into patches of 4x4"):
        vits.forward_taps(tiny(), images(18, 16))


def test_other_networks_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="ResNet is not timm's VisionTransformer"):
        vits.forward_taps(timm.create_model("resnet10t"), images())


def test_recomputed_blocks_give_the_same_gradients_with_stochastic_depth() -> None:
    model = tiny().train()
    vits.set_drop_path(model, 0.4)
    grads = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        torch.manual_seed(9)
        vits.forward_taps(model, images(batch=8))[-1].square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rates_rise_linearly_to_a_float32_tenth() -> None:
    rates = vits.drop_rates(0.1, 12)
    assert rates[0] == 0.0
    assert rates[-1] == float(torch.tensor(0.1)) != 0.1
    assert rates == sorted(rates)


@pytest.mark.parametrize(("rate", "rule"), [(0.0, "none"), (0.05, "mask"), (0.09999, "mask"), (0.1, "subset")])
def test_the_rule_follows_the_float32_rate(rate, rule) -> None:
    assert DropPath(rate).rule == rule


def test_only_the_last_block_of_a_model_at_a_tenth_uses_the_subset() -> None:
    model = tiny(depth=12)
    vits.set_drop_path(model, 0.1)
    rules = [(block.drop_path1.rule, block.drop_path2.rule) for block in model.blocks]
    assert rules == [("none", "none")] + [("mask", "mask")] * 10 + [("subset", "subset")]


@pytest.mark.parametrize(
    ("batch", "rate", "kept"), [(128, 0.1, 115), (10, 0.1, 8), (10, 0.25, 7), (1, 0.9, 1), (3, 0.9, 1)]
)
def test_the_subset_is_of_fixed_size_and_preserves_the_mean(batch, rate, kept) -> None:
    scale = DropPath(rate).draw(batch, torch.device("cpu"))
    assert (scale > 0).sum() == kept
    assert scale.max() == pytest.approx(batch / kept)


def test_subsets_differ_from_draw_to_draw_and_reach_every_sample() -> None:
    torch.manual_seed(0)
    path = DropPath(0.5)
    draws = torch.stack([path.draw(8, torch.device("cpu")) > 0 for _ in range(64)])
    assert len({tuple(row.tolist()) for row in draws}) > 30
    assert (draws.float().mean(0) - 0.5).abs().max() < 0.25


def test_the_mask_keeps_samples_at_their_rate_and_scales_by_its_inverse() -> None:
    torch.manual_seed(0)
    scale = DropPath(0.08).draw(20_000, torch.device("cpu"))
    assert sorted(scale.unique().tolist()) == pytest.approx([0.0, 1 / 0.92])
    assert scale.mean().item() == pytest.approx(1.0, abs=0.01)


def test_a_sample_is_dropped_whole_and_draws_follow_the_seed() -> None:
    path = DropPath(0.5).train()
    branch = torch.ones(6, 5, 4)
    torch.manual_seed(1)
    first = path(branch)
    torch.manual_seed(1)
    assert torch.equal(path(branch), first)
    assert sorted(first.flatten(1).unique(dim=1).flatten().tolist()) == [0, 0, 0, 2, 2, 2]


def test_stochastic_depth_rests_in_evaluation_and_under_timm_s_own_forward() -> None:
    model = tiny().eval()
    want = model(images())
    vits.set_drop_path(model, 0.3)
    assert torch.equal(model.eval()(images()), want)
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(images()), want)


def test_blocks_without_two_branches_are_refused() -> None:
    with pytest.raises(TypeError, match="ParallelScalingBlock has no two residual branches"):
        vits.set_drop_path(tiny(block_fn=ParallelScalingBlock), 0.1)


def test_drawing_never_waits_for_the_device() -> None:
    paths = DropPath(0.05).train(), DropPath(0.5).train()
    with HostSyncs() as syncs:
        for path in paths:
            path(torch.ones(8, 3))
    assert syncs.found == []
