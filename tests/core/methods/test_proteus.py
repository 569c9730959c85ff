from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from core.comm import Comm
from core.config import ConfigError
from core.methods.base import Batch, Features, Info
from core.methods.proteus import Proteus, ProteusOptions, proteus_loss
from core.models.students import build_student
from core.plain import PlainEngine
from core.recipe import Student, Train

SETTINGS = Train(img_size=32, epochs=10, batch=8, micro_batch=4, lr=0.5, lr_batch=4, min_lr=0.25, warmup_steps=20,
                 precision="fp32")  # fmt: skip
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
PLACES = 16
TEACHERS = {name: Info(name, dim, 2, 8, (4, 4), 1, True, True, 32) for name, dim in (("b", 6), ("a", 5))}


def built(settings: Train = SETTINGS, **options: Any) -> tuple[Proteus, Any, Info]:
    torch.manual_seed(0)
    method = Proteus(ProteusOptions(**options), settings, 100)
    student, info = build_student(Student("vit_tiny_patch16_224", TINY), 32, 0, "")
    return method, method.build(student, info, TEACHERS), info


def batch(index: list[int], training: bool = True) -> Batch:
    images = torch.randn(len(index), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Batch({"image": images}, torch.tensor(index), 22, 3, 0, training)


def features(images: int = 4) -> dict[str, Features]:
    g = torch.Generator().manual_seed(2)
    return {name: Features(torch.randn(images, t.dim, generator=g), torch.randn(images, PLACES, t.dim, generator=g))
            for name, t in TEACHERS.items()}  # fmt: skip


# ---- what fits


@pytest.mark.parametrize(
    ("options", "settings", "student", "message"),
    [
        ({}, {}, {"has_cls": False}, "has no class token"),
        ({}, {}, {"is_vit": False, "has_cls": False}, "no plain ViT blocks"),
        ({}, {}, {"grid": (2, 2)}, "cannot be matched token by token"),
        ({"lambda_token": -1.0}, {}, {}, "must not be negative"),
        ({"lambda_token": 0.0, "lambda_feature": 0.0, "lambda_patch": 0.0}, {}, {}, "nor all 0"),
        ({"distance": "cosin"}, {}, {}, "method.options.distance.*did you mean cosine"),
        ({"schedule": "late"}, {}, {}, "method.options.schedule"),
        ({"mask_probability": 0.0}, {}, {}, "mask_probability"),
        ({"mask_ratio": [0.0]}, {}, {}, "mask_ratio"),
        ({"mask_ratio": [1.0]}, {}, {}, "mask_ratio"),
        ({"mask_ratio": [0.5, 0.1]}, {}, {}, "mask_ratio"),
        ({"ema": 1.0}, {}, {}, "method.options.ema"),
        ({"export_average": True}, {}, {}, "method.options.ema"),
        ({}, {"micro_batch": 1}, {}, "train.micro_batch: of 1 samples"),
    ],
)
def test_what_cannot_work_is_refused(
    options: dict[str, Any], settings: dict[str, Any], student: dict[str, Any], message: str
) -> None:
    method = Proteus(ProteusOptions(**options), dataclasses.replace(SETTINGS, **settings), 100)
    info = dataclasses.replace(built()[2], **student)
    with pytest.raises(ConfigError, match=message):
        method.check(info, TEACHERS)


def test_masks_do_not_matter_to_a_method_without_a_patch_loss() -> None:
    method, module, info = built(lambda_feature=0.0, lambda_patch=0.0, mask_probability=0.0)
    method.check(info, TEACHERS)
    assert not any(key in name for name, _ in module.named_parameters() for key in ("mask_token", "patch.", "feature"))
    assert method.prepare(batch([0, 1, 2, 3])).extra == {}


# ---- the loss


def test_only_masked_samples_are_run_again_and_loss_and_gradients_are_those_of_two_whole_passes() -> None:
    method, module, _ = built(half_images=False)
    module = module.double()
    seen: list[int] = []
    module.student.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(len(args[0])))
    ready = method.prepare(batch([4, 7, 1, 0]))
    ready.views["image"] = ready.views["image"].double()
    targets = method.targets(features(), ready)
    loss, report = method.losses(module(ready), targets, ready)
    assert seen == [4 + 2], "one pass over the batch and its first half"
    got = torch.autograd.grad(loss, list(module.parameters()))

    masks = torch.zeros(4 * PLACES, dtype=torch.bool)
    masks[ready.extra["mask_index"]] = True
    masks = masks.view(4, PLACES)
    whole = {"mask": masks, "mask_rows": torch.arange(4), "mask_at": masks.flatten().nonzero().flatten()}
    outputs = module(dataclasses.replace(ready, extra=whole))
    terms = []
    for name, feature in features().items():
        out = outputs[name]
        both = torch.cat([out["token"][:, None], out["feature"]], 1)
        want_both = torch.cat([feature.cls[:, None], feature.patch], 1).double()
        terms.append(F.mse_loss(out["token"], feature.cls.double()) + F.mse_loss(both, want_both))
        terms[-1] = terms[-1] + F.mse_loss(out["patch"], feature.patch[masks].double())
    want = torch.stack(terms).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, list(module.parameters())))
    assert report["loss/dist"] == loss


def test_a_micro_batch_without_masks_has_no_patch_term_and_no_nan() -> None:
    empty = {"t": {"token": torch.ones(2, 3), "feature": torch.ones(2, 4, 3), "patch": torch.zeros(0, 3)}}
    zero = {"t": {key: torch.zeros_like(x) for key, x in empty["t"].items()}}
    assert proteus_loss(empty, zero, (1.0, 1.0, 1.0))[0] == 2


def test_a_term_of_weight_zero_is_not_computed() -> None:
    tokens = {"t": {"token": torch.full((2, 3), 2.0)}}
    loss, report = proteus_loss(tokens, {"t": {"token": torch.zeros(2, 3)}}, (0.5, 0.0, 0.0))
    assert loss == 2
    assert report.keys() == {"loss/token_t", "loss/feature_t", "loss/patch_t", "loss/dist"}
    assert report["loss/feature_t"] == report["loss/patch_t"] == 0.0


def test_terms_are_reported_times_their_weights() -> None:
    tokens = {"t": {"token": torch.ones(2, 3), "feature": torch.ones(2, 4, 3), "patch": torch.ones(5, 3)}}
    zero = {"t": {key: torch.zeros_like(x) for key, x in tokens["t"].items()}}
    loss, report = proteus_loss(tokens, zero, (0.5, 2.0, 3.0))
    assert [float(report[f"loss/{kind}_t"]) for kind in ("token", "feature", "patch")] == [0.5, 2.0, 3.0]
    assert loss == report["loss/dist"] == 5.5


def test_losses_are_float32_when_the_student_computes_in_bfloat16() -> None:
    method, module, _ = built()
    ready = method.prepare(batch([0, 1, 2, 3]))
    half = dataclasses.replace(ready, views={"image": ready.views["image"].bfloat16()})
    targets = method.targets(features(), ready)
    full, _ = method.losses(module(ready), targets, ready)
    outputs = module.bfloat16()(half)
    assert outputs["a"]["token"].dtype == torch.bfloat16
    loss, _ = method.losses(outputs, targets, ready)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, full, rtol=0.02, atol=0.0)


# ---- masks


def test_masks_are_drawn_by_sample_and_epoch() -> None:
    method, _, _ = built()
    first, again, other = (method.masks(batch(index)).masks for index in ([4, 7, 1, 0], [4, 7, 5, 6], [5, 7, 1, 0]))
    assert first.sum(1).tolist() == [8, 8, 0, 0]
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).any()
    assert (first[1] == other[1]).all()
    assert (method.masks(dataclasses.replace(batch([4, 7, 1, 0]), epoch=4)).masks != first).any()


def test_masks_may_fall_on_any_samples_with_shares_of_a_range() -> None:
    method, _, _ = built(mask_first=False, mask_ratio=[0.25, 0.75])
    drawn = [method.masks(batch(list(range(4 * i, 4 * i + 4)))).masks.sum(1) for i in range(20)]
    assert {tuple(counts > 0) for counts in drawn} > {(True, True, False, False)}
    for counts in drawn:
        low, high = sorted(counts[counts > 0].tolist())
        assert 4 <= low <= 8 <= high <= 12


def test_every_held_out_image_is_masked_alike_whatever_batch_it_is_in() -> None:
    method, _, _ = built(mask_ratio=[0.25, 0.75])
    together = method.masks(batch([4, 7, 1], training=False)).masks
    assert together.sum(1).tolist() == [8, 8, 8]
    np.testing.assert_array_equal(together[2:], method.masks(batch([1], training=False)).masks)


# ---- schedule, groups, export


def test_the_learning_rate_lags_one_epoch_and_is_constant_within() -> None:
    method = built()[0]  # 100 steps, 10 epochs, 2 of them warm-up, base 0.5 * 8 / 4 = 1
    lr = [method.schedules(step)["lr"] for step in range(100)]
    assert lr[0] == lr[19] == 1e-6
    assert lr[20] == lr[29] == pytest.approx(1e-6 + (1 - 1e-6) / 2)
    assert lr[30] == pytest.approx(0.25 + 0.75 * (1 + np.cos(np.pi * 0.2)) / 2)
    assert lr[99] == pytest.approx(0.25 + 0.75 * (1 + np.cos(np.pi * 0.8)) / 2)


def test_the_learning_rate_may_move_every_step() -> None:
    lr = [built(schedule="step")[0].schedules(step)["lr"] for step in (0, 10, 20, 100)]
    assert lr == pytest.approx([1e-6, 0.5, 0.25 + 0.75 * (1 + np.cos(np.pi * 0.2)) / 2, 0.25], abs=1e-6)


def test_tokens_and_positions_are_decayed_unless_named() -> None:
    method, module, _ = built(undecayed=["cls_token"])
    decayed, free = method.param_groups(module)
    assert {"student.pos_embed", "mask_token", "heads.a.token.1.weight"} <= set(decayed["names"])
    assert {"student.cls_token", "heads.a.token.0.weight", "student.norm.weight"} <= set(free["names"])


def test_the_export_is_the_student_alone() -> None:
    method, module, _ = built()
    weights = method.export(module.state_dict(), {})
    student, _ = build_student(Student("vit_tiny_patch16_224", TINY), 32, 5, "")
    student.load_state_dict(weights, strict=True)


def test_an_average_of_the_weights_is_kept_saved_and_exported_on_request() -> None:
    method, module, _ = built(ema=0.75, export_average=True)
    engine: Any = PlainEngine(module, method.param_groups(module), method.settings, Comm(torch.device("cpu")), False)
    method.attach(engine, lambda: built()[1])
    before = module.student.cls_token.detach().clone()
    for fragment in engine.fragments():
        fragment.view("weight").add_(1.0)
    method.after_step(0, Comm(torch.device("cpu")))
    exported = method.export(module.state_dict(), method.state())
    torch.testing.assert_close(exported["cls_token"], before + 0.25)
    later = built(ema=0.75)[0]
    later.attach(engine, lambda: built()[1])
    later.load_state(method.state())
    torch.testing.assert_close(later.state(), method.state())


def test_pixels_are_rounded_to_half_precision_as_released() -> None:
    images = batch([0, 1, 2, 3]).views["image"]
    rounded = built()[0].prepare(batch([0, 1, 2, 3])).views["image"]
    assert rounded.dtype == torch.float32
    assert torch.equal(rounded, images.half().float())
    assert torch.equal(built(half_images=False)[0].prepare(batch([0, 1, 2, 3])).views["image"], images)


def test_flops_count_the_masked_share() -> None:
    method, _, info = built()
    method.check(info, TEACHERS)
    embedding = 2.0 * PLACES * 3 * 8**2 * 24  # once for both passes
    trained, _ = method.student_flops(lambda side: 10_000.0 * side)
    assert trained == 320_000 + (320_000 - embedding) / 2
    assert method.head_flops(info, TEACHERS) == 2 * 24 * (5 + 6) * (1 + PLACES + PLACES / 4)
