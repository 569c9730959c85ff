from __future__ import annotations

import pytest
import torch
from torch import nn

from core.optim import clip_per_parameter, decay_groups
from tests.host_syncs import HostSyncs

torch.set_num_threads(1)


def _parameters() -> list[tuple[str, nn.Parameter]]:
    shapes = {
        "encoder.cls_token": (1, 1, 4),
        "encoder.proj.weight": (4, 3, 2, 2),
        "encoder.proj.bias": (4,),
        "encoder.norm.weight": (4,),
        "encoder.ls.gamma": (4,),
        "encoder.table.bias": (2, 2),
        "lp.weight": (4, 4),
    }
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


def test_biases_and_vectors_are_not_decayed_and_tokens_are() -> None:
    decayed, free = decay_groups(_parameters(), 0.03)
    assert decayed["names"] == ["encoder.cls_token", "encoder.proj.weight", "lp.weight"]
    assert free["names"] == ["encoder.proj.bias", "encoder.norm.weight", "encoder.ls.gamma", "encoder.table.bias"]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.03, 0.0)


def test_groups_hold_the_parameters_named() -> None:
    parameters = _parameters()
    by_name = dict(parameters)
    for group in decay_groups(parameters, 0.1):
        assert all(p is by_name[name] for name, p in zip(group["names"], group["params"], strict=True))


def test_frozen_parameters_are_in_no_group() -> None:
    parameters = _parameters()
    parameters[1][1].requires_grad_(False)
    parameters[3][1].requires_grad_(False)
    names = [name for group in decay_groups(parameters, 0.1) for name in group["names"]]
    assert len(names) == 5
    assert "encoder.proj.weight" not in names
    assert "encoder.norm.weight" not in names


def test_exempt_names_match_whole_components_from_the_right() -> None:
    parameters = [(n, nn.Parameter(torch.zeros(2, 2))) for n in ("cls_token", "encoder.cls_token", "my_cls_token", "w")]
    decayed, free = decay_groups(parameters, 0.1, {"cls_token"})
    assert free["names"] == ["cls_token", "encoder.cls_token"]
    assert decayed["names"] == ["my_cls_token", "w"]


def test_torch_optimisers_take_the_groups_as_they_are() -> None:
    optimiser = torch.optim.AdamW(decay_groups(_parameters(), 0.03), lr=1.0)
    assert [group["weight_decay"] for group in optimiser.param_groups] == [0.03, 0.0]


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    large, small = torch.full((4,), 3.0), torch.tensor([0.3, 0.4])
    norms = clip_per_parameter([large, None, small], 1.0)
    assert norms.tolist() == pytest.approx([6.0, 0.5])
    assert large.norm().item() == pytest.approx(1.0, abs=1e-6)
    assert torch.equal(small, torch.tensor([0.3, 0.4]))  # a global norm would have scaled this one, too


def test_clipping_needs_a_positive_norm() -> None:
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clip_per_parameter([torch.ones(2)], 0.0)


def test_no_gradients_at_all_is_fine() -> None:
    assert clip_per_parameter([None, None], 1.0).shape == (0,)


def test_norms_of_bfloat16_gradients_are_float32_and_the_gradients_stay_bfloat16() -> None:
    grad = torch.full((1000,), 0.1, dtype=torch.bfloat16)
    norms = clip_per_parameter([grad], 1.0)
    assert norms.dtype == torch.float32
    assert norms.item() == pytest.approx(float(torch.tensor(0.1).bfloat16()) * 1000**0.5, rel=1e-5)
    assert grad.dtype == torch.bfloat16
    assert grad.float().norm().item() == pytest.approx(1.0, rel=1e-2)


def test_clipping_never_waits_for_the_device() -> None:
    grads = [torch.randn(3, 3), None, torch.randn(5)]
    with HostSyncs() as syncs:
        clip_per_parameter(grads, 0.1)
    assert syncs.found == []
