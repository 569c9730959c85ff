from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from core.config import ConfigError
from core.methods.base import Batch, Info
from core.methods.fd import Fd, FdOptions
from core.methods.finetune import Finetune, FinetuneOptions, own_tables
from core.models.rel_pos import resize_table
from core.models.students import build_student
from core.recipe import Student, Train

SETTINGS = Train(img_size=32, batch=8, micro_batch=4, lr=0.5, lr_batch=4, min_lr=0.25, warmup_steps=4, precision="fp32")
SIZES = {"embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.1}
SHARED = Student("beit_base_patch16_224", {**SIZES, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
                                           "global_pool": "token"})  # fmt: skip
BEIT = Student("beit_base_patch16_224", {**SIZES, "use_rel_pos_bias": True, "global_pool": "avg"})
SWIN = Student("swinv2_base_window8_256", {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2})


NETWORK = Info("network", 24, 2, 16, (2, 2), 1, has_cls=True, is_vit=False, img_size=32)


def built(student: Student = BEIT, img_size: int = 32, **options: Any) -> tuple[Finetune, torch.nn.Module]:
    torch.manual_seed(0)
    options = {"num_classes": 5, **options}
    method = Finetune(FinetuneOptions(**options), dataclasses.replace(SETTINGS, img_size=img_size), 10)
    model, info = build_student(student, img_size, 0, "", method.initialise)
    return method, method.build(model, info, {})


def batch(index: tuple[int, ...] = (3, 1, 4, 2), training: bool = True) -> Batch:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32).contiguous()
    return Batch({"image": images}, torch.tensor(index), 22, 0, 0, training, labels=torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"num_classes": 1}, {}, "num_classes must be above 1"),
        ({"layer_decay": 0.0}, {}, "layer_decay in 0..1"),
        ({"smoothing": 1.5}, {}, "switch, smoothing, erase"),
        ({"mixup": 3.0}, {}, "mixup, cutmix: must lie in 0..2"),
        ({}, {"micro_batch": 1}, "train.micro_batch: images are mixed in pairs"),
        ({"init": "zero"}, {}, "method.options.init"),
        ({"projection": 8}, {}, "student.args.projection"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    student = {key: options[key] for key in options if key == "projection"}
    options = {key: value for key, value in options.items() if key != "projection"}
    method = Finetune(FinetuneOptions(**options), dataclasses.replace(SETTINGS, **settings), 10)
    with pytest.raises(ConfigError, match=message):
        method.check(dataclasses.replace(NETWORK, **student), {})


# ---- mixing


def test_the_mix_depends_on_the_samples_alone_and_changes_with_them() -> None:
    method, _ = built()
    first, again, other = (method.prepare(batch(i)) for i in ((3, 1, 4, 2), (3, 1, 4, 2), (5, 1, 4, 2)))
    assert torch.equal(first.views["image"], again.views["image"])
    assert not torch.equal(first.views["image"], other.views["image"])
    for mixed in (first, other):
        torch.testing.assert_close(mixed.extra["soft_targets"].sum(1), torch.ones(4))


def test_labels_are_mixed_as_far_as_images_are() -> None:
    for options in ({"cutmix": 0.0}, {"mixup": 0.0}):
        mixed = built(smoothing=0.0, **options)[0].prepare(batch())
        share = 1 - mixed.views["image"][0].mean() / 3  # the first image is 0, its partner 3
        assert 0 < share < 1
        torch.testing.assert_close(mixed.extra["soft_targets"][0], torch.tensor([share, 0, 0, 1 - share, 0]))


def test_in_evaluation_images_and_labels_are_as_they_are() -> None:
    given = batch(training=False)
    seen = built()[0].prepare(given)
    assert seen.views["image"] is given.views["image"]
    assert torch.equal(seen.extra["soft_targets"], torch.eye(5)[:4])


# ---- learning rates


def test_a_layers_factor_scales_the_peak_and_neither_warm_up_nor_minimum() -> None:
    method, _ = built(warmup_lr=0.1)
    for scale in (1.0, 0.25):
        lr = [method.lr(step, scale) for step in (0, 1, 5, 10**9)]
        assert lr == pytest.approx([0.2, 0.2, scale, 0.5])
    assert method.schedules(5) == {"lr": 1.0}


def test_a_head_starts_near_zero_and_learns_at_the_full_rate() -> None:
    method, module = built(layer_decay=0.5)
    groups = {name: group for group in method.param_groups(module) for name in group["names"]}
    assert module.get_parameter("head.weight").abs().max() < 2e-4
    found = [groups[n]["lr_scale"] for n in ("head.weight", "encoder.fc_norm.bias", "encoder.blocks.1.gamma_1",
                                             "encoder.blocks.0.gamma_1", "encoder.cls_token")]  # fmt: skip
    assert found == [1.0, 1.0, 0.5, 0.25, 0.125]


def test_merging_patches_learns_like_the_block_before_it() -> None:
    method, module = built(SWIN, layer_decay=0.5)
    groups = {name: group["layer"] for group in method.param_groups(module) for name in group["names"]}
    assert groups["encoder.layers.1.downsample.reduction.weight"] == groups["encoder.layers.0.blocks.1.norm1.bias"] == 2
    assert groups["encoder.layers.1.blocks.0.norm1.bias"] == 3
    assert groups["head.bias"] == groups["encoder.norm.bias"] == 5


# ---- from distillation


@pytest.mark.parametrize("img_size", [32, 48])
def test_a_distilled_student_gives_every_block_its_table_and_keeps_the_fresh_head(img_size: int) -> None:
    fd = Fd(FdOptions(), SETTINGS, 10)
    student, info = build_student(SHARED, 32, 1, "", fd.initialise)
    distilled = fd.build(student, info, {"t": info})
    torch.nn.init.normal_(distilled.get_parameter("encoder.rel_pos_bias.relative_position_bias_table"))
    method, module = built(img_size=img_size)
    head = module.get_parameter("head.weight").detach().clone()
    module.load_state_dict(method.take_over(distilled.state_dict()), strict=True)
    tables = [module.get_parameter(f"encoder.blocks.{i}.attn.relative_position_bias_table") for i in (0, 1)]
    shared = distilled.get_parameter("encoder.rel_pos_bias.relative_position_bias_table")
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], shared) == (img_size == 32)
    assert torch.equal(tables[0][-3:], shared[-3:]), "rows of the class token are copied"
    assert torch.equal(module.get_parameter("head.weight"), head)
    weight = "encoder.blocks.1.mlp.fc1.weight"
    assert torch.equal(module.get_parameter(weight), distilled.get_parameter(weight))
    if img_size == 32:
        images = torch.randn(2, 3, 32, 32)
        mean = distilled.eval().encoder.forward_intermediates(images, intermediates_only=True)[-1].mean((2, 3))
        torch.testing.assert_close(module.eval().encoder(images), module.encoder.fc_norm(mean))


def test_a_later_stage_of_fine_tuning_keeps_its_head() -> None:
    method, module = built()
    torch.nn.init.normal_(module.get_parameter("head.weight"))
    again, _ = built()
    assert torch.equal(again.take_over(module.state_dict())["head.weight"], module.get_parameter("head.weight"))


def test_the_loss_is_float32_under_bf16_and_every_parameter_trains() -> None:
    method, module = built()
    given = method.prepare(batch())
    exact, report = method.losses(module(given), method.targets({}, given), given)
    exact.backward()
    assert [n for n, p in module.named_parameters() if p.grad is None] == []
    half = dataclasses.replace(given, views={"image": given.views["image"].bfloat16()})
    loss, _ = method.losses(module.bfloat16()(half), method.targets({}, given), given)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    assert report["top1"].shape == ()


def test_images_without_labels_or_with_more_classes_than_outputs_are_refused() -> None:
    method, _ = built(num_classes=5)
    method.check_labels(5, "data.source")
    with pytest.raises(ConfigError, match=r"data\.heldout: .* have none"):
        method.check_labels(0, "data.heldout")
    with pytest.raises(ConfigError, match=r"num_classes: 5, but data\.source has 6"):
        method.check_labels(6, "data.source")


def test_tables_without_a_class_token_are_resized_as_a_whole() -> None:
    shared = torch.randn(25, 2)
    own = {f"blocks.{i}.attn.relative_position_bias_table": torch.empty(49, 2) for i in (0, 1)}
    taken = own_tables({"rel_pos_bias.relative_position_bias_table": shared}, own)
    assert taken.keys() == own.keys()
    for table in taken.values():
        torch.testing.assert_close(table, resize_table(shared, (3, 3), (4, 4)))
