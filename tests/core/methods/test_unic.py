from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from core.comm import Comm
from core.config import ConfigError
from core.methods.base import Batch, Features, Info
from core.methods.unic import Unic, UnicOptions, unic_loss
from core.models.students import build_student
from core.recipe import Student, Train
from core.stats import STD_FLOOR

ALONE = Comm(torch.device("cpu"))
SETTINGS = Train(img_size=16, batch=8, micro_batch=4, lr=0.5, lr_batch=4, min_lr=0.25, warmup_steps=3, precision="fp32")
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
TEACHERS = {name: Info(name, dim, 2, 8, (2, 2), 1, True, True, 16) for name, dim in (("b", 6), ("a", 5))}


def built(args: dict[str, Any] | None = None, **options: Any) -> tuple[Unic, torch.nn.Module, Info]:
    torch.manual_seed(0)
    method = Unic(UnicOptions(hidden=7, last_hidden=9, **options), SETTINGS, 10)
    student, info = build_student(Student("vit_tiny_patch16_224", {**TINY, **(args or {})}), 16, 0, "")
    return method, method.build(student, info, TEACHERS), info


def features(seed: int, images: int = 4) -> dict[str, Features]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: Features(3 * torch.randn(images, t.dim, generator=g) + 1, torch.randn(images, 4, t.dim, generator=g) - 2)
        for name, t in TEACHERS.items()
    }


def batch(index: list[int], training: bool = True, micro: int = 0) -> Batch:
    return Batch({"image": torch.zeros(len(index), 3, 16, 16)}, torch.tensor(index), 22, 0, micro, training)


# ---- what fits


@pytest.mark.parametrize(
    ("options", "settings", "student", "message"),
    [
        ({}, {}, {"has_cls": False}, "student.name: .* has no class token"),
        ({}, {}, {"is_vit": False, "has_cls": False}, "student.name: .* has no plain ViT blocks"),
        ({"hidden": 0}, {}, {}, "method.options.hidden"),
        ({"drop": 1.5}, {}, {}, "method.options.drop"),
        ({"scale": (0.5, 0.1)}, {}, {}, "method.options.drop, scale"),
        ({}, {"lr": 0.0}, {}, "train.lr: 0 would learn nothing"),
    ],
)
def test_what_cannot_work_is_refused(
    options: dict[str, Any], settings: dict[str, Any], student: dict[str, Any], message: str
) -> None:
    method = Unic(UnicOptions(**options), dataclasses.replace(SETTINGS, **settings), 10)
    with pytest.raises(ConfigError, match=message):
        method.check(dataclasses.replace(TEACHERS["a"], **student), TEACHERS)


def test_dropping_needs_a_second_teacher() -> None:
    alone = {"a": TEACHERS["a"]}
    with pytest.raises(ConfigError, match=r"method\.options\.drop: 0\.5, but a is the only teacher"):
        Unic(UnicOptions(), SETTINGS, 10).check(TEACHERS["a"], alone)
    Unic(UnicOptions(drop=0.0), SETTINGS, 10).check(TEACHERS["a"], alone)


# ---- the module


def test_released_names_heads_on_every_block_and_nothing_off_the_loss_path_trains() -> None:
    method, module, info = built()
    method.check(info, TEACHERS)
    names = dict(module.named_parameters())
    heads = {(n.split(".")[2], n.split(".")[3], int(n.split(".")[4])) for n in names if n.startswith("lp.heads.")}
    assert heads == {(t, kind, block) for t in "ab" for kind in ("cls", "patch") for block in range(3)}
    assert names["lp.heads.a.cls.1.layers.0.weight"].shape == (7, 24)
    assert names["lp.heads.a.cls.2.layers.0.weight"].shape == (9, 24)
    frozen = [n for n, p in names.items() if not p.requires_grad]
    assert frozen == ["encoder.norm.weight", "encoder.norm.bias"]


@pytest.mark.parametrize("args", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}, {"init_values": 1e-2}])
def test_every_trainable_parameter_of_any_vit_gets_a_gradient(args: dict[str, Any]) -> None:
    method, module, _ = built(args)
    targets = method.targets(features(0), batch([0, 1, 2, 3]))
    outputs = module(Batch({"image": torch.randn(4, 3, 16, 16)}))
    assert {t: {k: tuple(v.shape) for k, v in kinds.items()} for t, kinds in outputs.items()} == {
        t: {"cls": (4, i.dim), "patch": (4, 4, i.dim)} for t, i in TEACHERS.items()
    }
    loss, _ = method.losses(outputs, targets, batch([0, 1, 2, 3]))
    loss.backward()
    assert [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [n for n, p in module.named_parameters() if not p.requires_grad and p.grad is not None] == []


def test_groups_hold_every_trainable_parameter_and_decay_matrices_alone() -> None:
    method, module, _ = built()
    decayed, free = method.param_groups(module)
    trainable = {n for n, p in module.named_parameters() if p.requires_grad}
    assert {*decayed["names"], *free["names"]} == trainable
    assert (decayed["weight_decay"], free["weight_decay"]) == (SETTINGS.weight_decay, 0.0)
    assert {"encoder.cls_token", "encoder.pos_embed"} <= set(decayed["names"])
    assert all(n.endswith("bias") or p.ndim == 1 for n, p in zip(free["names"], free["params"], strict=True))


def test_export_is_the_encoder_in_timm_s_names() -> None:
    method, module, _ = built()
    exported = method.export(module.state_dict(), {})
    student, _ = build_student(Student("vit_tiny_patch16_224", TINY), 16, 1, "")
    assert exported.keys() == student.state_dict().keys()


def test_head_flops_need_no_weights_and_count_two_per_multiply_add() -> None:
    method, _, info = built()
    per_token = sum(2 * hidden * (24 + t.dim) for t in TEACHERS.values() for hidden in (7, 7, 9))
    assert method.head_flops(info, TEACHERS) == per_token * (1 + 4)


# ---- statistics


def standardised(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (z - mean) / (std + STD_FLOOR)


def test_targets_use_the_statistics_of_before_and_all_micro_batches_enter_the_next() -> None:
    method, _, _ = built()
    first, second = features(1), features(2)
    for micro, given in enumerate((first, second)):
        targets = method.targets(given, batch([0, 1, 2, 3], micro=micro))
        for name in TEACHERS:  # mean 0, deviation 1 at the beginning, for both micro-batches of the step
            torch.testing.assert_close(targets[name]["cls"], given[name].cls / (1 + STD_FLOOR))
    method.after_step(0, ALONE)  # momentum 1: replaced
    third = features(3)
    targets = method.targets(third, batch([0, 1, 2, 3]))
    for name in TEACHERS:
        for kind in ("cls", "patch"):
            z = torch.cat([getattr(f[name], kind).flatten(0, -2) for f in (first, second)])
            want = standardised(getattr(third[name], kind), z.mean(0), z.std(0) + STD_FLOOR)
            torch.testing.assert_close(targets[name][kind], want)


def test_evaluation_leaves_statistics_alone_and_drops_no_teacher() -> None:
    method, module, _ = built(drop=1.0)
    before = {k: v.clone() for k, v in method.state().items()}
    quiet = batch([0, 1, 2, 3], training=False)
    targets = method.targets(features(1), quiet)
    outputs = module(Batch({"image": torch.randn(4, 3, 16, 16)}))
    _, report = method.losses(outputs, targets, quiet)
    assert report["t_coeff"].tolist() == [0.5, 0.5]
    method.targets(features(2), batch([0, 1, 2, 3]))
    method.after_step(0, ALONE)
    alone = Unic(method.options, SETTINGS, 10)
    alone.build(build_student(Student("vit_tiny_patch16_224", TINY), 16, 0, "")[0], built()[2], TEACHERS)
    alone.targets(features(2), batch([0, 1, 2, 3]))
    alone.after_step(0, ALONE)
    assert all(alone.state()[k].equal(v) for k, v in method.state().items())
    assert any(not before[k].equal(v) for k, v in method.state().items())


def test_state_is_taken_over_and_a_second_build_keeps_it() -> None:
    method, _, info = built()
    method.targets(features(1), batch([0, 1, 2, 3]))
    method.after_step(0, ALONE)
    state = {k: v.clone() for k, v in method.state().items()}
    assert len(state) == 2 * 2 * 2
    other, _, _ = built()
    other.load_state(state)
    other.build(build_student(Student("vit_tiny_patch16_224", TINY), 16, 0, "")[0], info, TEACHERS)
    assert all(other.state()[k].equal(v) for k, v in state.items())


# ---- draws and schedules


def test_draws_depend_on_the_sample_and_neither_on_its_place_nor_on_its_neighbours() -> None:
    method, _, _ = built()
    whole = method.draws(batch([7, 3, 9, 1]), 2)
    assert whole.shape == (2, 4)
    assert 0 <= float(whole.min()) <= float(whole.max()) < 1
    assert method.draws(batch([9], micro=5), 2).equal(whole[:, 2:3])
    assert not method.draws(dataclasses.replace(batch([7, 3, 9, 1]), epoch=1), 2).equal(whole)
    assert not method.draws(dataclasses.replace(batch([7, 3, 9, 1]), seed=23), 2).equal(whole)


def test_schedules_warm_up_to_the_scaled_rate_and_end_near_the_least() -> None:
    method, _, _ = built()
    values = [method.schedules(step) for step in range(11)]
    rates = [v["lr"] for v in values]
    assert rates[:4] == [0.0, 0.5, 1.0, 1.0]  # 0.5 times batch 8 / lr_batch 4
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[10] == 0.25
    momenta = [v["tnorm_ema_momentum"] for v in values]
    assert momenta[0] == 1.0
    assert momenta == sorted(momenta, reverse=True)
    unscaled = Unic(UnicOptions(), dataclasses.replace(SETTINGS, lr_batch=0), 10)
    assert unscaled.schedules(3)["lr"] == 0.5


def test_weighing_images_equally_is_an_option() -> None:
    tokens = {t: {"cls": torch.randn(3, i.dim), "patch": torch.randn(3, 4, i.dim)} for t, i in TEACHERS.items()}
    targets = {t: {k: torch.randn_like(v) for k, v in kinds.items()} for t, kinds in tokens.items()}
    u_TB = torch.tensor([[0.9, 0.1, 0.1], [0.9, 0.1, 0.1]])
    pairs, report = unic_loss(tokens, targets, u_TB, 0.5, 0.5, 0.5)
    images, _ = unic_loss(tokens, targets, u_TB, 0.5, 0.5, 0.5, per_image=True)
    loss_TB = report["loss_per_image"]
    kept = [loss_TB[:, 0].tolist(), [float(loss_TB[:, 1].max())], [float(loss_TB[:, 2].max())]]
    assert float(pairs) == pytest.approx(sum(sum(k) for k in kept) / 4, rel=1e-6)
    assert float(images) == pytest.approx(sum(sum(k) / len(k) for k in kept) / 3, rel=1e-6)
