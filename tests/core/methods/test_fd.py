from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from core.config import ConfigError
from core.methods.base import Batch, Features, Info
from core.methods.fd import Fd, FdOptions, fd_loss, resize_tokens, whiten
from core.models.init import STD
from core.models.students import build_student, create
from core.models.weights import load_strict
from core.recipe import Student, Train

SETTINGS = Train(img_size=32, batch=8, micro_batch=4, lr=0.5, lr_batch=4, min_lr=0.25, warmup_steps=4, precision="fp32")
BEIT = Student("beit_base_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.1,
                                         "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
                                         "global_pool": "token"}, drop_path=0.2)  # fmt: skip
SWIN = Student("swinv2_base_window8_256", {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2})
VIT = Student("vit_tiny_patch16_224", {"embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 2})
TEACHERS = {name: Info(name, dim, 2, 16, (2, 2), 1, True, True, 32) for name, dim in (("b", 6), ("a", 5))}


def built(student: Student = BEIT, **options: Any) -> tuple[Fd, torch.nn.Module, Info]:
    torch.manual_seed(0)
    method = Fd(FdOptions(**options), SETTINGS, 10)
    model, info = build_student(student, 32, 0, "", method.initialise)
    teachers = {k: dataclasses.replace(t, grid=info.grid) for k, t in TEACHERS.items()}
    return method, method.build(model, info, teachers), info


def features(images: int = 4, patches: int = 4) -> dict[str, Features]:
    return {n: Features(torch.randn(images, t.dim), torch.randn(images, patches, t.dim)) for n, t in TEACHERS.items()}


def batch(images: int = 4) -> Batch:
    return Batch({"image": torch.randn(images, 3, 32, 32)}, torch.arange(images))


# ---- what fits


@pytest.mark.parametrize(
    ("options", "teacher", "message"),
    [
        ({"beta": 0.0}, {}, "beta and accumulation must be above 0"),
        ({"whiten_eps": 0.0}, {}, "whiten_eps, beta and accumulation must be above 0"),
        ({"scale": (0.5, 0.1)}, {}, "scale within 0..1"),
        ({"tokens": "none"}, {}, "tokens is all or patch"),
        ({}, {"grid": (7, 7)}, "has 7x7 tokens and the student .* 2x2; .* method.options.resize=true"),
        ({}, {"has_cls": False}, "no class token; set method.options.tokens=patch"),
        ({}, {"grid": (0, 0)}, "compares tokens on a grid"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], teacher: dict[str, Any], message: str) -> None:
    method = Fd(FdOptions(**options), SETTINGS, 10)
    with pytest.raises(ConfigError, match=message):
        method.check(TEACHERS["a"], {"a": dataclasses.replace(TEACHERS["a"], **teacher)})


def test_a_teacher_of_another_grid_without_class_token_fits_by_options() -> None:
    method = Fd(FdOptions(tokens="patch", resize=True), SETTINGS, 10)
    method.check(TEACHERS["a"], {"a": dataclasses.replace(TEACHERS["a"], grid=(7, 7), has_cls=False)})


def test_a_projected_class_feature_is_no_token() -> None:
    method, _, _ = built()
    seen = features() | {"a": Features(torch.randn(4, 9), torch.randn(4, 4, 5))}
    with pytest.raises(ConfigError, match="teachers.a.cls=token"):
        method.targets(seen, batch())


# ---- maths


def test_the_loss_does_not_see_scale_or_shift_of_a_teacher_token() -> None:
    tokens, pred = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    changed = tokens * torch.rand(2, 5, 1).double().add(50) + torch.randn(2, 5, 1)
    torch.testing.assert_close(fd_loss(pred, whiten(tokens)), fd_loss(pred, whiten(changed)), atol=2e-5, rtol=0)


def test_predicting_zero_for_gaussian_tokens_costs_a_quarter() -> None:
    target = whiten(torch.randn(64, 50, 256, generator=torch.Generator().manual_seed(0)))
    assert fd_loss(torch.zeros_like(target), target).item() == pytest.approx(0.247, abs=1e-3)


def test_tokens_keep_their_places_on_another_grid() -> None:
    rows = torch.arange(4.0).repeat_interleave(6).view(1, 24, 1)  # 4 x 6 patches, each the number of its row
    got = resize_tokens(rows, (4, 6), (2, 3)).view(2, 3)
    torch.testing.assert_close(got, torch.tensor([[0.5] * 3, [2.5] * 3]))


def test_targets_and_loss_stay_in_float32_for_outputs_in_bf16() -> None:
    method, module, _ = built()
    module.eval()
    images, given = batch(), features()
    targets = method.targets({k: Features(f.cls.bfloat16(), f.patch.bfloat16()) for k, f in given.items()}, images)
    assert {t.dtype for t in targets} == {torch.float32}
    exact, _ = method.losses(module(images), method.targets(given, images), images)
    half = Batch({"image": images.views["image"].bfloat16()})
    loss, _ = method.losses(module.bfloat16()(half), targets, images)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)


# ---- the module


@pytest.mark.parametrize(("student", "options", "tokens"), [(BEIT, {}, 5), (BEIT, {"tokens": "patch"}, 4),
                                                            (VIT, {}, 5), (SWIN, {"tokens": "patch"}, 16)])  # fmt: skip
def test_every_student_predicts_every_teacher_and_all_of_it_trains(
    student: Student, options: dict[str, Any], tokens: int
) -> None:
    method, module, info = built(student, **options)
    out = module(batch())
    assert [tuple(pred.shape) for pred in out] == [(4, tokens, 5), (4, tokens, 6)], "in sorted order of teachers"
    loss, report = method.losses(out, method.targets(features(patches=info.grid[0] ** 2), batch()), batch())
    loss.backward()
    without = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert report.keys() == {"loss/a", "loss/b", "loss/zero"}
    torch.testing.assert_close(loss.detach(), (report["loss/a"] + report["loss/b"]) / 2)


def test_a_released_start_is_cut_off_at_one_deviation_and_fresh_projectors_cost_a_third() -> None:
    method, module, _ = built()
    weight = module.get_parameter("encoder.patch_embed.proj.weight")
    assert STD * 0.98 < weight.abs().max() <= STD
    wide = Info("wide", 512, 2, 16, (2, 2), 1, True, True, 32)
    module = method.build(
        create(VIT.name, {"depth": 1}, 32, "student"), dataclasses.replace(wide, dim=192), {"a": wide}
    )
    seen = {"a": Features(torch.randn(4, 512), torch.randn(4, 4, 512))}
    loss, _ = method.losses(module(batch()), method.targets(seen, batch()), batch())
    assert loss.item() == pytest.approx(0.325, abs=0.01)


@pytest.mark.parametrize("student", [BEIT, SWIN])
def test_the_exported_student_is_timms_own_network(student: Student) -> None:
    method, module, _ = built(student, tokens="patch")
    again = create(student.name, student.args, 32, "student")
    load_strict(again, method.export(module.state_dict(), {}))
    images = torch.randn(2, 3, 32, 32)
    own: Any = module.get_submodule("encoder").eval()
    torch.testing.assert_close(again.eval()(images), own(images))


def test_the_bias_table_and_the_projector_are_decayed_and_tokens_are_not() -> None:
    method, module, _ = built()
    decayed, free = method.param_groups(module)
    assert {"decoder.0.weight", "encoder.rel_pos_bias.relative_position_bias_table"} <= set(decayed["names"])
    assert {"encoder.cls_token", "decoder.0.bias", "encoder.blocks.0.attn.q_bias"} <= set(free["names"])


# ---- schedule


def rates(epoch_steps: int = 1, **options: Any) -> list[float]:
    method = Fd(FdOptions(warmup_lr=0.1, **options), SETTINGS, 10)
    method.epoch_steps = epoch_steps
    return [method.schedules(step)["lr"] for step in range(11)]


def test_all_three_rates_follow_the_batch_and_the_schedule_is_a_step_late() -> None:
    lr = rates()
    assert lr[:6] == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert lr[-1] == pytest.approx(0.5 + 0.25 * (1 + torch.cos(torch.tensor(torch.pi * 5 / 6)).item()))


def test_with_accumulation_the_schedule_counts_iterations() -> None:
    assert rates(accumulation=2)[:5] == pytest.approx([0.2, 0.3, 0.5, 0.7, 0.9])
    assert rates(2, accumulation=2, leftover=1)[:5] == pytest.approx([0.2, 0.28, 0.44, 0.68, 0.84])


def test_views_are_bilinear_crops_without_colour() -> None:
    (view,) = built()[0].views()
    assert (view.interpolation, view.jitter, view.gray, view.blur, view.solarise) == ("bilinear", 0, 0, 0, 0)


def test_a_projector_costs_two_operations_a_weight_and_token() -> None:
    method, _, info = built()
    assert method.head_flops(info, TEACHERS) == 2 * 5 * 24 * (5 + 6)
