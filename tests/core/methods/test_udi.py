from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from core.comm import Comm
from core.config import ConfigError
from core.data.udi_crops import GLOBALS
from core.losses_udi import Rows, combine, cross_entropy, udi_loss, warmup_temperature
from core.methods.base import Batch, Info
from core.methods.udi import Udi, UdiModel, UdiOptions
from core.models.drop_path import SampleDropPath
from core.models.students import build_student
from core.plain import PlainEngine
from core.recipe import Student, Train

ALONE = Comm(torch.device("cpu"))
SETTINGS = Train(img_size=32, batch=4, micro_batch=2, lr=0.5, lr_batch=4, min_lr=0.25, warmup_steps=3,
                 weight_decay=0.04, clip=3.0, precision="fp32")  # fmt: skip
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "reg_tokens": 1}
SIZES = {"local_crops": 3, "local_size": 16, "window": 2, "local_window": 1, "hidden": 12, "bottleneck": 6, "out": 20}


def method(settings: dict[str, Any] | None = None, **options: Any) -> Udi:
    return Udi(UdiOptions(**SIZES | options), dataclasses.replace(SETTINGS, **settings or {}), 10)


def student(udi: Udi, drop_path: float = 0.0, **args: Any) -> tuple[nn.Module, Info]:
    return build_student(Student("vit_tiny_patch16_224", TINY | args, drop_path), 32, 0, "", udi.initialise)


def ready(udi: Udi, drop_path: float = 0.0) -> tuple[UdiModel, PlainEngine, Info]:
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        network, info = student(udi, drop_path)
        return udi.build(network, info, {})

    module = fresh()
    engine = PlainEngine(module, udi.param_groups(module), udi.settings, ALONE, True)
    udi.attach(engine, fresh)  # type: ignore[arg-type]
    assert isinstance(module, UdiModel)
    return module, engine, student(udi)[1]


def batch(udi: Udi, images: int = 2, seed: int = 0, epoch: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    views = {view.name: torch.randn(images, 3, view.size, view.size, generator=g) for view in udi.views()}
    extra = udi.crops()(22, epoch, np.arange(images), np.full((images, 2), 64)).extra
    return Batch(views, torch.arange(images), 22, epoch, extra={k: torch.from_numpy(v) for k, v in extra.items()})


# ---- what fits


@pytest.mark.parametrize(
    ("options", "settings", "info", "message"),
    [
        ({}, {}, {"prefix": 1}, "student.args: udi trains a ViT with two class tokens"),
        ({}, {}, {"is_vit": False}, "student.args"),
        ({"local_size": 20}, {}, {}, "method.options.local_size: 20 is no multiple"),
        ({"window": 5}, {}, {}, "method.options.window: 5 does not fit"),
        ({"local_window": 3}, {}, {}, "method.options.local_window: 3 does not fit"),
        ({"alpha": 1.5}, {}, {}, "method.options.alpha: must lie in 0..1"),
        ({"temperature": (0.0, 0.1)}, {}, {}, "temperatures must be above 0"),
        ({"local_crops": -1}, {}, {}, "local_crops"),
        ({"layers": 0}, {}, {}, "method.options.layers: the head has at least one layer, got 0"),
        ({}, {"lr": 0.0}, {}, "train.lr: 0 would learn nothing"),
    ],
)
def test_what_cannot_work_is_refused(
    options: dict[str, Any], settings: dict[str, Any], info: dict[str, Any], message: str
) -> None:
    fits = Info("vit", 24, 2, 8, (4, 4), 2, has_cls=True, is_vit=True, img_size=32)
    method().check(fits, {})
    with pytest.raises(ConfigError, match=message):
        method(settings, **options).check(dataclasses.replace(fits, **info), {})
    with pytest.raises(ConfigError, match=r"teachers: .* remove t"):
        method().check(fits, {"t": fits})


def test_a_vit_whose_class_tokens_have_no_positions_is_refused() -> None:
    udi = method()
    network, info = student(udi, no_embed_class=True)
    with pytest.raises(ConfigError, match="no_embed_class"):
        udi.build(network, info, {})


# ---- the module


def test_class_tokens_start_at_their_own_deviation_and_are_one_parameter() -> None:
    module, _, _ = ready(method())
    token = dict(module.named_parameters())["backbone.backbone.cls_token"]
    assert token.shape == (1, 2, 24)
    assert 0.01 < float(token.std()) < 0.04
    assert "backbone.backbone.reg_token" not in dict(module.named_parameters())


def test_every_trainable_parameter_gets_a_gradient_and_no_position_is_wasted() -> None:
    udi = method()
    module, _, _ = ready(udi)
    given = batch(udi)
    outputs = module(given)
    assert {name: tuple(rows.shape) for name, rows in outputs.items()} == {
        "cls": (2, 2, 20), "mixed": (2, 2, 20), "patch": (2, 2, 4, 20), "local_cls": (3, 2, 20),
        "local_mixed": (3, 2, 20),
    }  # fmt: skip
    udi.losses(outputs, udi.targets({}, given), given)[0].backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_teacher_reads_the_other_crop() -> None:
    """Row 0 is of crop B and row 1 of crop A; small crops do not reach the teacher."""
    udi = method()
    ready(udi)
    given = batch(udi)
    before = udi.targets({}, given)["cls"]
    changed = {**given.views, GLOBALS[0]: torch.zeros_like(given.views[GLOBALS[0]]),
               "local0": torch.zeros_like(given.views["local0"])}  # fmt: skip
    after = udi.targets({}, dataclasses.replace(given, views=changed))["cls"]
    assert after[0].equal(before[0])
    assert not after[1].equal(before[1])


def test_averaging_bottlenecks_first_gives_the_logits_of_averaged_predictions() -> None:
    g = torch.Generator().manual_seed(0)
    cls, patch, local = (torch.randn(*shape, 6, generator=g).double() for shape in ((2, 3), (2, 3, 4), (5, 2, 3, 2)))
    w_patch, w_local = torch.rand(2, 3, 4, generator=g).double().round(), torch.rand(5, 2, 3, 2, generator=g).double()
    weight = torch.randn(9, 6, generator=g).double()
    first = combine(cls, patch, local, w_patch, w_local, 0.3)
    last = combine(cls @ weight.T, patch @ weight.T, local @ weight.T, w_patch, w_local, 0.3)
    for name in last:
        torch.testing.assert_close(first[name] @ weight.T, last[name])


def test_without_any_match_centre_and_patch_loss_stay_finite() -> None:
    rows = combine(torch.zeros(2, 1, 4), torch.ones(2, 1, 3, 4), None, torch.zeros(2, 1, 3), None, 0.5)
    assert rows["means"][2].tolist() == [1.0] * 4
    view: Rows = {"cls": torch.zeros(2, 1, 4), "mixed": torch.zeros(2, 1, 4), "patch": torch.ones(2, 1, 3, 4)}
    loss, parts = udi_loss(view, rows, torch.zeros(2, 1, 3), torch.zeros(3, 4), temperature=0.1,
                           student_temperature=0.1, weights=(1, 1, 1))  # fmt: skip
    assert bool(loss.isfinite())
    assert float(parts["g_pch"]) == 0.0


def test_cross_entropy_with_a_soft_target() -> None:
    z, p = torch.randn(5, 7).double(), torch.rand(5, 7).double().softmax(-1)
    want = nn.functional.cross_entropy(z / 0.1, p, reduction="none")
    torch.testing.assert_close(cross_entropy(p, z, 0.1), want)


@pytest.mark.parametrize(("rate", "kinds"), [(0.0, []), (0.1, ["mask"] * 2)])
def test_depth_is_dropped_sample_by_sample_in_the_student_alone(rate: float, kinds: list[str]) -> None:
    udi = method()
    module, _, _ = ready(udi, rate)
    module.train()
    found = [m for m in module.modules() if isinstance(m, SampleDropPath) and m.rate > 0]
    assert [path.rule for path in found] == kinds
    assert not any(m.training for m in udi.teacher.network.modules())


def test_last_layer_and_head_stay_in_float32_under_bf16() -> None:
    udi = method()
    module, _, _ = ready(udi)
    given = batch(udi)
    views = {name: x.bfloat16() for name, x in given.views.items()}
    outputs = module.bfloat16()(dataclasses.replace(given, views=views))
    assert {rows.dtype for rows in outputs.values()} == {torch.float32}
    assert udi.centre.bfloat16().center.dtype == torch.float32


# ---- state


def step(udi: Udi, engine: PlainEngine, number: int) -> Batch:
    for micro in range(2):
        given = batch(udi, seed=2 * number + micro)
        engine.backward(udi.losses(engine.forward(given), udi.targets({}, given), given)[0])
    engine.step(lambda scale: udi.lr(number, scale), udi.schedules(number)["weight_decay"])
    udi.after_step(number, ALONE)
    return given


def test_the_centre_moves_by_the_mean_of_the_micro_batches_means() -> None:
    udi = method()
    ready(udi)
    means = [udi.targets({}, batch(udi, seed=seed))["means"] for seed in (1, 2)]
    udi.after_step(0, ALONE)
    torch.testing.assert_close(udi.centre.center, 0.1 * (means[0] + means[1]) / 2)
    udi.targets({}, dataclasses.replace(batch(udi), training=False))
    assert udi._pending == []


def test_the_last_layer_rests_for_the_first_epochs() -> None:
    udi = method(freeze_epochs=1)
    udi.epoch_steps = 2
    module, engine, _ = ready(udi)
    last = dict(module.named_parameters())["head.0.last_layer.weight_v"]
    first = last.detach().clone()
    moved = []
    for number in range(3):
        step(udi, engine, number)
        moved.append(not last.equal(first))
    assert moved == [False, False, True]
    assert [group["frozen_steps"] for group in udi.param_groups(module)[2:]] == [2]


def test_groups_hold_every_trainable_parameter_once() -> None:
    for norm_last_layer in (False, True):
        udi = method(norm_last_layer=norm_last_layer)
        module, _, _ = ready(udi)
        names = [name for group in udi.param_groups(module) for name in group["names"]]
        assert sorted(names) == sorted(name for name, p in module.named_parameters() if p.requires_grad)
        assert ("head.0.last_layer.weight_g" in names) != norm_last_layer


def test_export_is_the_average_in_timm_s_names() -> None:
    udi = method()
    module, engine, _ = ready(udi)
    step(udi, engine, 0)
    step(udi, engine, 1)
    state = udi.state()
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY)
    plain.load_state_dict(udi.export(dict(module.state_dict()), state), strict=True)
    x = torch.randn(2, 3, 32, 32)
    teacher = udi.teacher.network
    assert isinstance(teacher, UdiModel)
    want = teacher.backbone(x, None)[0]
    torch.testing.assert_close(plain.eval().forward_features(x)[:, :2], want)
    assert not torch.allclose(module.eval().backbone(x, None)[0], want)


def test_state_is_taken_over() -> None:
    udi, other = method(), method()
    _, engine, _ = ready(udi)
    step(udi, engine, 0)
    step(udi, engine, 1)
    ready(other)
    other.load_state({name: value.clone() for name, value in udi.state().items()})
    given = batch(udi)
    assert all(
        a.equal(b) for a, b in zip(udi.targets({}, given).values(), other.targets({}, given).values(), strict=True)
    )
    assert other.centre.center.equal(udi.centre.center)


# ---- views, evaluation, schedules


def test_evaluation_needs_no_crops_and_is_deterministic() -> None:
    udi = method()
    module, _, _ = ready(udi)
    views = {view.name: torch.randn(2, 3, view.size, view.size, generator=torch.Generator().manual_seed(0))
             for view in udi.views()}  # fmt: skip
    quiet = udi.prepare(Batch(views, training=False))
    assert [*quiet.views] == [*GLOBALS, "local0"]
    module.eval()
    losses = [float(udi.losses(module(quiet), udi.targets({}, quiet), quiet)[0].detach()) for _ in range(2)]
    assert losses[0] == losses[1]
    assert udi.prepare(batch(udi)).extra.keys() == batch(udi).extra.keys()


@pytest.mark.parametrize(
    ("layers", "shapes"),
    [(1, {"mlp": (6, 24)}), (2, {"mlp.0": (12, 24), "mlp.2": (6, 12)}),
     (4, {"mlp.0": (12, 24), "mlp.2": (12, 12), "mlp.4": (12, 12), "mlp.6": (6, 12)})],
)  # fmt: skip
def test_a_head_has_the_layers_asked_for_under_the_released_names(layers: int, shapes: dict[str, Any]) -> None:
    udi = method(layers=layers)
    module, engine, info = ready(udi)
    weights = {name: tuple(p.shape) for name, p in module.head[0].named_parameters() if p.ndim == 2}
    gains = {"last_layer.weight_g": (20, 1), "last_layer.weight_v": (20, 6)}
    assert weights == {f"{name}.weight": shape for name, shape in shapes.items()} | gains
    small = batch(udi)
    loss, _ = udi.losses(engine.forward(small), udi.targets({}, small), small)
    engine.backward(loss)
    assert all(p.grad is not None for p in module.head.parameters())
    assert udi.head_flops(info, {}) > 0


def test_views_are_two_large_and_several_small_crops() -> None:
    assert [(view.name, view.size) for view in method().views()] == [
        ("global0", 32), ("global1", 32), ("local0", 16), ("local1", 16), ("local2", 16),
    ]  # fmt: skip


def test_schedules_of_the_release() -> None:
    values = [method().schedules(number) for number in range(11)]
    assert [v["lr"] for v in values][:4] == [0.0, 0.25, 0.5, 0.5]
    assert (values[0]["weight_decay"], values[10]["weight_decay"]) == (pytest.approx(0.04), 0.1)
    assert (values[0]["teacher_momentum"], values[10]["teacher_momentum"]) == (0.996, 1.0)
    warm = method(temperature_epochs=4)
    assert [warm.temperature(e) for e in (0, 1, 3, 9)] == pytest.approx([0.04, 0.05, 0.07, 0.07])
    assert [warmup_temperature(e, 0.04, 0.07, 4) for e in (0, 1, 3, 9)] == pytest.approx([0.04, 0.05, 0.07, 0.07])


def test_flops_count_all_views_of_the_student_and_one_pass_of_the_teacher() -> None:
    udi = method()
    trained, untrained = udi.student_flops(lambda pixels: float(pixels**2))
    assert trained == 2 * 32**2 + 3 * 16**2
    assert untrained == 2 * 32**2
    info = student(udi)[1]
    udi.build(student(udi)[0], info, {})
    rows = 2 * (2 + 4) + 2 * 3
    head = 2 * rows * (24 * 12 + 12 * 12 + 12 * 6 + 6 * 20)
    attention = 2 * (6 * 16 * 24**2 + 4 * (2 * 24**2 + 8 * 16 * 24))
    assert udi.head_flops(info, {}) == head + attention
