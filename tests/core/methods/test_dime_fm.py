from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.config import ConfigError
from core.data.features import IMAGE, TEXT
from core.losses_pairs import Weights, score_divergence, score_losses
from core.methods.base import Batch, Features, Info
from core.methods.dime_fm import DimeFm, DimeFmOptions
from core.models.clip import init_clip
from core.models.students import create, describe
from core.recipe import Train
from core.registry import at_stage, find

TINY = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 12}
INFO = Info("vit", 64, 2, 8, (2, 2), 1, has_cls=True, is_vit=True, img_size=16, projection=12)
TRAIN = Train(img_size=16, batch=8, micro_batch=8, lr=8e-4, lr_batch=0, min_lr=4e-5, warmup_steps=4, weight_decay=0.05)


def tiny() -> nn.Module:
    return create("vit_base_patch32_clip_quickgelu_224", TINY, 16, "student")


def method(settings: Train = TRAIN, **options: Any) -> DimeFm:
    return DimeFm(DimeFmOptions(**options), settings, 100)


def draw(rows: int, seed: int, width: int = 12) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_a_student_with_the_teachers_vectors_has_no_loss_and_no_slope() -> None:
    image, student = draw(6, 1), (3 * draw(6, 1)).requires_grad_()
    total, _ = score_losses(student, image, draw(9, 2), Weights(0.7, 0.3, 0.1), use_pvl=True, use_udist=True)
    total.backward()
    assert abs(total.item()) < 1e-5
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-4


def test_divergence_is_the_mean_over_rows_or_columns() -> None:
    teacher, student = 5 * draw(3, 1, 4).double(), 5 * draw(3, 2, 4).double()
    for dim, count in ((1, 3), (0, 4)):
        p, q = (torch.softmax(x / 2, dim) for x in (teacher, student))
        want = (p * (p.log() - q.log())).sum() / count
        torch.testing.assert_close(score_divergence(teacher, student, 2.0, dim), want)


def test_scores_stay_float32_when_the_student_is_bf16() -> None:
    image, text, student = draw(32, 1, 64), draw(32, 2, 64), draw(32, 3, 64).bfloat16()
    want = score_losses(student.float(), image, text, Weights())[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = score_losses(student, image, text, Weights())[0]
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-6)


def test_options_reach_the_loss_and_zero_weights_leave_terms_out() -> None:
    outputs, targets = draw(4, 1), {IMAGE: draw(4, 2), TEXT: draw(4, 3)}
    plain, report = method().losses(outputs, targets, Batch({}))
    assert report["loss/udist"] == 0
    assert plain == pytest.approx((0.7 * report["loss/vl"] + 0.3 * report["loss/pvl"]).item())
    more, report = method(pvl=0.0, udist=0.1, vector=2.0).losses(outputs, targets, Batch({}))
    assert report["loss/pvl"] == 0
    want = 0.7 * report["loss/vl"] + 0.1 * report["loss/udist"] + 2 * report["loss/vector"]
    assert more == pytest.approx(want.item())


def test_the_rate_lags_a_step_and_ends_at_its_floor() -> None:
    rates = [method().lr(step, 1.0) for step in range(102)]
    assert rates[0] == rates[1] == 4e-6
    assert rates[3] == pytest.approx(4e-6 + 2 * (8e-4 - 4e-6) / 4)
    assert max(rates) == rates[5] < 8e-4
    assert rates[101] == 4e-5
    doubled = dataclasses.replace(TRAIN, lr_batch=4)
    assert method(doubled).lr(50, 1.0) == pytest.approx(2 * rates[50])


def test_tokens_and_position_tables_are_not_decayed_and_the_projection_is() -> None:
    own = method()
    decay, free = own.param_groups(own.build(tiny(), INFO, {}))
    assert {"encoder.head.weight", "encoder.patch_embed.proj.weight"} <= set(decay["names"])
    assert {"encoder.cls_token", "encoder.pos_embed", "encoder.norm.weight"} <= set(free["names"])
    assert "encoder.head.bias" not in decay["names"] + free["names"]
    assert (decay["weight_decay"], free["weight_decay"]) == (0.05, 0.0)


def test_targets_are_the_stored_vectors_or_the_online_teachers() -> None:
    batch = Batch({}, extra={IMAGE: draw(2, 1), TEXT: draw(2, 2)})
    assert method().targets({}, batch)[IMAGE] is batch.extra[IMAGE]
    seen = Features(draw(2, 5), draw(2, 6))
    online = method(online=True).targets({"clip": seen}, batch)
    assert online[IMAGE] is seen.cls
    assert online[TEXT] is batch.extra[TEXT]


@pytest.mark.parametrize(("online", "loaded"), [(False, 0), (True, 1)])
def test_teachers_are_loaded_only_where_they_see_images(online: bool, loaded: int) -> None:
    from core.config import load

    recipe = load("dime-fm-b32", "smoke", [f"method.options.online={str(online).lower()}"])
    assert len(at_stage(recipe, "main").teachers) == loaded
    assert find("dime_fm").couples_batch


@pytest.mark.parametrize(
    ("options", "info", "teachers", "message"),
    [
        ({}, dataclasses.replace(INFO, projection=0), {}, r"student\.args\.num_classes"),
        ({"vl": 0.0, "pvl": 0.0}, INFO, {}, "nor all zero"),
        ({"t_pvl": 0.0}, INFO, {}, "temperatures must be above 0"),
        ({"init": "zeros"}, INFO, {}, "released or timm"),
        ({"online": True}, INFO, {}, "takes one teacher"),
        ({"online": True}, INFO, {"clip": dataclasses.replace(INFO, projection=16)}, "have 16 numbers"),
    ],
)
def test_what_cannot_work_is_refused(
    options: dict[str, Any], info: Info, teachers: dict[str, Info], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        method(**options).check(info, teachers)


def test_a_batch_of_one_image_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        method(dataclasses.replace(TRAIN, batch=1, micro_batch=1)).check(INFO, {})


def test_the_module_gives_projected_vectors_and_exports_as_timm_has_them() -> None:
    own, student = method(), tiny()
    module = own.build(student, describe(student, "vit", 16, "student"), {})
    images = torch.randn(2, 3, 16, 16)
    assert module(Batch({"image": images})).shape == (2, 12)
    assert own.export(dict(module.state_dict()), {}).keys() == student.state_dict().keys()


def test_initial_weights_are_those_of_clips_tower() -> None:
    torch.manual_seed(0)
    vit: Any = create("vit_base_patch32_clip_quickgelu_224", {**TINY, "embed_dim": 256, "num_heads": 4}, 64, "student")
    assert init_clip(vit.requires_grad_(False))
    for tensor in (vit.cls_token, vit.pos_embed, vit.head.weight):
        assert float(tensor.std()) == pytest.approx(256**-0.5, rel=0.15)
    block = vit.blocks[0]
    assert float(block.attn.qkv.weight.abs().max()) <= np.sqrt(6 / (256 + 768)) + 1e-6
    assert float(block.attn.qkv.weight.std()) == pytest.approx(np.sqrt(2 / (256 + 768)), rel=0.02)
    assert float(block.mlp.fc1.weight.std()) == pytest.approx(256**-0.5 / np.sqrt(3), rel=0.02)
    assert block.attn.qkv.bias.abs().max() == block.attn.proj.bias.abs().max() == 0
    assert block.mlp.fc1.bias.abs().max() > 0
    assert not init_clip(nn.Linear(2, 2))


def test_shifted_windows_run_in_bf16_with_masks_in_float32() -> None:
    args = {"embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "num_classes": 6}
    swin = create("swin_tiny_patch4_window7_224", args, 32, "student")
    for parameter in swin.parameters():
        parameter.data = parameter.data.bfloat16()
    assert swin(torch.randn(2, 3, 32, 32).bfloat16()).dtype == torch.bfloat16
