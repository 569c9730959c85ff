"""Frozen teachers: targets, grids, normalisation, strictness."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from core.config import ConfigError, Recipe, Student, Teacher
from core.data.views import IMAGENET_MEAN, IMAGENET_STD
from core.models.students import describe_student
from core.models.teachers import FrozenTeacher, describe_teachers, load_teachers, take
from core.models.weights import WeightsError

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
STUDENT = Student(name="vit_tiny_patch16_224", args=TINY)


def _recipe(**teachers: Teacher) -> Recipe:
    return Recipe(name="t", student=STUDENT, teachers=teachers)


def _load(recipe: Recipe, root: str = "file:///nowhere") -> dict[str, FrozenTeacher]:
    info = describe_student(STUDENT, 32)
    return load_teachers(recipe, info, describe_teachers(recipe, info), root, torch.device("cpu"), torch.float32)


def test_a_teacher_of_another_patch_size_sees_the_image_resized_to_the_students_grid() -> None:
    recipe = _recipe(other=Teacher("vit_tiny_patch16_224", {**TINY, "patch_size": 14, "img_size": 56}, "random"))
    features = _load(recipe)["other"](torch.randn(2, 3, 32, 32))
    assert features.patch.shape == (2, 16, 24)
    assert features.cls.shape == (2, 24)


def test_own_normalisation_is_folded_in_exactly() -> None:
    args = {**TINY, "img_size": 32}
    folded = _load(_recipe(clip=Teacher("vit_base_patch16_clip_224", args, "random", normalize="own")))["clip"]
    plain = _load(_recipe(clip=Teacher("vit_base_patch16_clip_224", args, "random")))["clip"]
    pixels = torch.rand(2, 3, 32, 32)

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    config = timm.get_pretrained_cfg("vit_base_patch16_clip_224")
    assert tuple(config.mean) != tuple(IMAGENET_MEAN)
    seen = folded(normalised(IMAGENET_MEAN, IMAGENET_STD)).patch
    torch.testing.assert_close(seen, plain(normalised(config.mean, config.std)).patch, atol=2e-5, rtol=1e-4)


def test_random_weights_depend_on_the_teachers_name_alone() -> None:
    teacher = Teacher("vit_tiny_patch16_224", TINY, "random")
    torch.manual_seed(1)
    first = _load(_recipe(a=teacher, b=teacher))
    torch.manual_seed(2)
    second = _load(_recipe(a=teacher, b=teacher))
    x = torch.randn(1, 3, 32, 32)
    assert first["a"](x).patch.equal(second["a"](x).patch)
    assert not first["a"](x).patch.equal(first["b"](x).patch)


def test_pooled_targets_of_a_model_without_final_norm_leave_the_patches_unnormed() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", img_size=32, **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        pooled, patches = take(vit, images, "pooled")
        raw = vit.forward_features(images)
    torch.testing.assert_close(patches, raw[:, 1:])
    torch.testing.assert_close(pooled, vit.fc_norm(raw[:, 1:].mean(1)))


def test_wrong_weights_and_a_missing_class_token_are_refused_with_the_field(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, **TINY)
    state = {k: v for k, v in model.state_dict().items() if k != "norm.weight"}
    save_file(state, tmp_path / "w.safetensors")
    recipe = _recipe(mine=Teacher("vit_tiny_patch16_224", {**TINY, "img_size": 32}, f"file://{tmp_path}/w.safetensors"))
    with pytest.raises(WeightsError, match="norm.weight"):
        _load(recipe)
    siglip = _recipe(s=Teacher("vit_base_patch16_siglip_224", {"depth": 1}, "random"))
    with pytest.raises(ConfigError, match=r"teachers\.s\.cls: .*no class token; use teachers\.s\.cls=pooled"):
        _load(siglip)
    with pytest.raises(ConfigError, match=r"teachers\.r\.name: resnet18 is no plain ViT"):
        _load(_recipe(r=Teacher("resnet18", {}, "random")))
