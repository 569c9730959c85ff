from __future__ import annotations

from typing import Any

import pytest
import torch

from core.models.drop_path import SampleDropPath, use_sample_drop_path
from core.models.fused import fuse_attention
from core.models.students import create
from tests.core.models.drawn import network

SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.1, "global_pool": "token", "img_size": 32}
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    ("beit_base_patch16_224", {**SIZES, "use_rel_pos_bias": True}),
    ("beit_base_patch16_224", {**SIZES, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    ("swinv2_base_window8_256", {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4,
                                 "img_size": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args"), NETWORKS)
def test_fused_attention_gives_timms_features_and_gradients_under_timms_names(name: str, args: dict[str, Any]) -> None:
    plain, fused = network(name, args), network(name, args)
    fuse_attention(fused)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    outputs = [model(images) for model in (plain, fused)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    own = dict(plain.named_parameters())
    for key, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, own[key].grad, msg=key)


def test_buffers_left_in_float32_do_not_matter_in_bf16() -> None:
    for name, args in NETWORKS:
        model = network(name, args).float()
        fuse_attention(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        assert model(torch.randn(1, 3, 32, 32).bfloat16()).dtype == torch.bfloat16


def test_stochastic_depth_drops_samples_by_themselves_at_rates_above_a_tenth() -> None:
    model = create(*NETWORKS[1][:1], {**NETWORKS[1][1], "drop_path_rate": 0.5}, None, "student")
    use_sample_drop_path(model)
    found = [module for module in model.modules() if isinstance(module, SampleDropPath)]
    assert [path.rate for path in found] == [0.5, 0.5], "two branches of the last block; the first block's rate is 0"
    kept = found[0].train()(torch.ones(4000, 1))
    assert kept.unique().tolist() == [0.0, 2.0]
    assert kept.mean().item() == pytest.approx(1.0, abs=0.1)
    assert kept[:2000].mean() != 1.0, "the number kept is drawn as well"
