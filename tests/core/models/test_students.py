from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.config import ConfigError
from core.models.students import build_arguments, build_student, create, describe, describe_student
from core.models.vit import DropPath, resize_pos_embed
from core.models.weights import WeightsError
from core.recipe import Student

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
VIT = "vit_tiny_patch16_224"


def student(name: str = VIT, args: dict[str, Any] | None = None, **more: Any) -> Student:
    return Student(name, TINY if args is None else args, **more)


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_bse_patch16_224", "student.name: timm has no model .*; did you mean vit_base_patch16_224"),
        ("vit_tiny_patch16_224.in1k", "weights: write name: vit_tiny_patch16_224 and weights: hub:timm/vit_tiny_"),
        ("hf-hub:timm/vit_tiny_patch16_224", "student.name: timm has no model 'hf-hub:timm/"),
        ("local-dir:/tmp/weights", "student.name: timm has no model 'local-dir:/tmp/weights'"),
        ("vit_*", "student.name: timm has no model 'vit_[*]'"),
        ("", "student.name: timm has no model ''"),
    ],
)  # fmt: skip
def test_an_unknown_name_is_told_with_the_nearest_one(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create(name, {}, 224, "student")


def test_an_argument_that_timm_does_not_take_is_told() -> None:
    with pytest.raises(ConfigError, match=r"teachers.x: timm cannot build vit_tiny_patch16_224 .*dpeth"):
        create(VIT, {"dpeth": 3}, 224, "teachers.x")


LOADING = [
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "cache_dir",
]


@pytest.mark.parametrize("name", LOADING)
def test_weights_come_from_the_field_weights_alone(name: str) -> None:
    for value in ("/tmp/x.pth", {"file": "/tmp/x.pth"}, True, False):
        with pytest.raises(ConfigError, match=rf"teachers.x.args.{name}: .* teachers.x.weights: hub:<id>, file:///x"):
            create(VIT, {**TINY, name: value}, 16, "teachers.x")


@pytest.mark.parametrize("name", ["features_only", "out_indices", "scriptable", "device", "dtype"])
def test_an_argument_that_wraps_or_moves_the_network_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"student.args.{name}: makes something else of the network"):
        create(VIT, {**TINY, name: 1}, 16, "student")


def test_an_argument_about_the_windows_of_weights_is_no_loader() -> None:
    sizes = {"depths": (1, 1), "num_heads": (2, 3), "embed_dim": 6, "window_size": 2, "patch_size": 4}
    create("swinv2_base_window8_256", {**sizes, "pretrained_window_sizes": (2, 2)}, 16, "student")


@pytest.mark.parametrize("name", ["init_values", "norm_eps", "global_pool", "drop_rate"])
def test_an_argument_that_timm_would_drop_is_refused_with_what_to_write(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"student.args.{name}: timm drops null .*write what is meant: 0, false"):
        create("beit_base_patch16_224", {"embed_dim": 24, "depth": 1, "num_heads": 2, name: None}, 32, "student")


def test_a_network_without_layer_scale_is_written_with_0() -> None:
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2, "init_values": 0}
    assert not [key for key in create("beit_base_patch16_224", small, 32, "student").state_dict() if "gamma" in key]


def test_images_that_patches_do_not_divide_are_refused_with_a_size_that_works() -> None:
    with pytest.raises(ConfigError, match=r"student: .* patches of 8 pixels, .* images of 20; use train.img_size=16"):
        describe_student(student(), 20)


def test_the_image_size_has_one_place() -> None:
    with pytest.raises(ConfigError, match=r"student.args.img_size: .* train.img_size; remove this one"):
        describe_student(student(args={**TINY, "img_size": 32}), 32)


def test_stochastic_depth_has_one_place() -> None:
    with pytest.raises(ConfigError, match=r"student.args.drop_path_rate: .* student.drop_path; remove this one"):
        describe_student(student(args={**TINY, "drop_path_rate": 0.1}), 32)


def test_stochastic_depth_that_a_model_has_no_place_for_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"student.drop_path: vit_small_patch16_18x2_224"):
        build_student(student("vit_small_patch16_18x2_224", {"depth": 1, "embed_dim": 24}, drop_path=0.1), 32, 0, "")


# ---- what is known


@pytest.mark.parametrize(
    ("name", "args", "prefix", "has_cls"),
    [
        (VIT, {}, 1, True),
        (VIT, {"reg_tokens": 2}, 3, True),
        (VIT, {"class_token": False, "global_pool": "avg"}, 0, False),
        ("deit3_small_patch16_224", {}, 1, True),
        ("vit_base_patch16_siglip_224", {}, 0, False),
    ],
)
def test_a_plain_vit_is_described_from_its_shapes(name: str, args: dict[str, Any], prefix: int, has_cls: bool) -> None:
    info = describe_student(student(name, {**TINY, **args}), 32)
    assert (info.dim, info.depth, info.patch, info.grid, info.img_size) == (24, 3, 8, (4, 4), 32)
    assert (info.prefix, info.has_cls, info.is_vit) == (prefix, has_cls, True)


SWIN, HYBRID, DISTILLED = "swin_tiny_patch4_window7_224", "vit_base_r50_s16_224", "deit_tiny_distilled_patch16_224"


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", SWIN, HYBRID, DISTILLED])
def test_a_network_whose_blocks_cannot_be_tapped_is_no_plain_vit(name: str) -> None:
    with torch.device("meta"):
        info = describe(create(name, {}, 224, "student"), name, 224, "student")
    assert (info.is_vit, info.has_cls, info.img_size) == (False, False, 224)
    assert info.dim > 0


def test_only_models_that_depend_on_it_are_told_the_image_size() -> None:
    assert build_arguments(VIT, {"depth": 2}, 32) == {"img_size": 32, "depth": 2}
    assert build_arguments(SWIN, {}, 64) == {"img_size": 64}
    assert build_arguments("resnet18", {}, 32) == {}


# ---- what is built


def test_initial_weights_depend_on_the_seed_alone_and_disturb_no_other_draws() -> None:
    torch.manual_seed(1)
    first, info = build_student(student(), 16, 22, "")
    drawn = torch.rand(3)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.rand(3), drawn)
    torch.manual_seed(2)
    again, _ = build_student(student(), 16, 22, "")
    other, _ = build_student(student(), 16, 23, "")
    assert info == describe_student(student(), 16)
    assert all(first.state_dict()[k].equal(v) for k, v in again.state_dict().items())
    assert not first.state_dict()["pos_embed"].equal(other.state_dict()["pos_embed"])


def test_stochastic_depth_grows_over_the_blocks() -> None:
    model, _ = build_student(student(drop_path=0.2), 16, 0, "")
    rates = [(block.drop_path1, block.drop_path2) for block in model.blocks]
    assert all(isinstance(path, DropPath) for pair in rates for path in pair)
    assert [pair[1].rate for pair in rates] == pytest.approx([0.0, 0.1, 0.2])
    assert not any(isinstance(m, DropPath) for m in build_student(student(), 16, 0, "")[0].modules())


WINDOWS = {"depths": (1, 1), "num_heads": (2, 3), "embed_dim": 6, "window_size": 2, "patch_size": 4}


@pytest.mark.parametrize(
    ("name", "args", "size"),
    [("swinv2_base_window8_256", WINDOWS, 16), (SWIN, WINDOWS, 16),
     ("fasternet_t1", {}, 64), (VIT, TINY, 16), ("repvit_m1", {}, 32)],
)  # fmt: skip
def test_no_stochastic_depth_is_none_whatever_timm_does_by_itself(name: str, args: dict[str, Any], size: int) -> None:
    model, _ = build_student(Student(name, args), size, 0, ".")
    assert not [m for m in model.modules() if getattr(m, "drop_prob", 0) or getattr(m, "rate", 0)]


def test_the_rate_of_a_student_of_windows_is_the_recipe_s() -> None:
    model, _ = build_student(Student("swinv2_base_window8_256", WINDOWS, drop_path=0.3), 16, 0, ".")
    assert max(getattr(m, "drop_prob", 0) for m in model.modules()) == pytest.approx(0.3)


def test_stochastic_depth_of_other_networks_is_timm_s_own() -> None:
    model, _ = build_student(
        student("convnext_atto", {"depths": [1, 1, 1, 2], "dims": [8] * 4}, drop_path=0.3), 32, 0, ""
    )
    assert [m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"][-1] == pytest.approx(0.3)


def test_weights_are_loaded_strictly(tmp_path: Path) -> None:
    source, _ = build_student(student(), 16, 7, "")
    state = {k: v.detach().contiguous() for k, v in source.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    loaded, _ = build_student(student(weights="store:w.safetensors"), 16, 0, f"file://{tmp_path}")
    assert all(loaded.state_dict()[k].equal(v) for k, v in state.items())
    save_file(
        {k: v for k, v in state.items() if k != "norm.bias"} | {"odd": torch.ones(1)}, tmp_path / "odd.safetensors"
    )
    with pytest.raises(WeightsError, match=r"missing: norm.bias\s+unexpected: odd"):
        build_student(student(weights="store:odd.safetensors"), 16, 0, f"file://{tmp_path}")


def test_a_position_table_of_another_grid_is_resampled_for_the_stage_s_images(tmp_path: Path) -> None:
    source, _ = build_student(student(args={**TINY, "reg_tokens": 1}), 32, 7, "")
    save_file({k: v.detach().contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    made = student(args={**TINY, "reg_tokens": 1}, weights="store:w.safetensors")
    loaded, _ = build_student(made, 24, 0, f"file://{tmp_path}")
    want = resize_pos_embed(source.pos_embed.detach(), (4, 4), (3, 3), 2)
    torch.testing.assert_close(loaded.pos_embed.detach(), want)
    with pytest.raises(WeightsError, match=r"pos_embed: file \(1, 18, 24\), model \(1, 10, 24\)"):
        build_student(
            student(weights="store:w.safetensors", args={**TINY, "reg_tokens": 0}), 24, 0, f"file://{tmp_path}"
        )
