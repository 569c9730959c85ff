from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from core.config import ConfigError
from core.data.views import IMAGENET_MEAN, IMAGENET_STD
from core.methods.base import Info
from core.models.features import take
from core.models.students import create, describe
from core.models.teachers import FrozenTeacher, describe_teachers, load_teachers, own_normalisation
from core.models.weights import WeightsError
from core.recipe import Recipe, Teacher

VIT, CLIP = "vit_tiny_patch16_224", "vit_base_patch16_clip_quickgelu_224"
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
STUDENT = Info("student", 24, 2, 8, (3, 3), 1, has_cls=True, is_vit=True, img_size=24)
CPU = torch.device("cpu")


def recipe(**teachers: Teacher) -> Recipe:
    return Recipe(name="x", teachers=teachers)


def teacher(name: str = VIT, args: dict[str, Any] | None = None, weights: str = "random", **more: Any) -> Teacher:
    return Teacher(name, TINY if args is None else {**TINY, **args}, weights, **more)


def loaded(made: Recipe, student: Info = STUDENT, root: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return load_teachers(made, student, describe_teachers(made, student), root, CPU, dtype)


def one(made: Teacher, student: Info = STUDENT) -> FrozenTeacher:
    found = loaded(recipe(t=made), student)["t"]
    assert isinstance(found, FrozenTeacher)
    return found


def pixels(size: int = 24) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


# ---- targets


@pytest.mark.parametrize(("name", "args"), [(VIT, {}), (VIT, {"reg_tokens": 2}), (CLIP, {})])
def test_token_targets_are_timm_s_normed_features(name: str, args: dict[str, Any]) -> None:
    made, x = one(teacher(name, args)), pixels()
    tokens = made.model.forward_features(x)
    cls, patch = take(made.model, x, "token")
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patch, tokens[:, made.model.num_prefix_tokens :])


def test_pooled_targets_are_timm_s_pre_logits_and_patches_without_a_norm_of_their_own() -> None:
    made, x = one(teacher(args={"global_pool": "avg"}, cls="pooled")), pixels()
    with torch.no_grad():
        made.model.fc_norm.weight.fill_(3.0)
    features = made(x)
    torch.testing.assert_close(features.cls, made.model.fc_norm(features.patch.mean(1)))
    assert features.cls.shape == (2, 24)
    assert features.patch.shape == (2, 9, 24)


@pytest.mark.parametrize(("patch", "size"), [(8, 24), (14, 42), (4, 12)])
def test_grids_of_other_patch_sizes_are_reconciled_by_resizing_the_image(patch: int, size: int) -> None:
    made, x = one(teacher(args={"patch_size": patch, "img_size": 4 * patch})), pixels()
    info = describe_teachers(recipe(t=teacher(args={"patch_size": patch})), STUDENT)["t"]
    assert (info.grid, info.img_size) == (STUDENT.grid, size)
    features = made(x)
    assert features.patch.shape == (2, 9, 24)
    seen = x if size == 24 else F.interpolate(x, (size, size), mode="bicubic", antialias=True)
    torch.testing.assert_close(features.patch, take(made.model, seen, "token")[1])


def test_a_student_without_patches_leaves_images_as_they_are() -> None:
    student = Info("convnext", 8, 0, 0, (0, 0), 0, has_cls=False, is_vit=False, img_size=32)
    assert one(teacher(), student)(pixels(32)).patch.shape == (2, 16, 24)
    with pytest.raises(ConfigError, match="patches of 8 pixels, which do not divide images of 30"):
        describe_teachers(recipe(t=teacher()), Info("c", 8, 0, 0, (0, 0), 0, False, False, 30))


# ---- normalisation


@pytest.mark.parametrize("name", [VIT, CLIP])
def test_a_teacher_s_own_normalisation_is_folded_into_its_patch_embedding_exactly(name: str) -> None:
    plain = one(teacher(name)).double()
    folded = one(teacher(name, normalize="own")).double()
    mean, std = own_normalisation(teacher(name))
    assert mean != IMAGENET_MEAN
    x = pixels().double()
    want = plain(normalised(x, mean, std))
    got = folded(normalised(x, IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(got.patch, want.patch, rtol=2e-5, atol=2e-5)  # folded in float32
    torch.testing.assert_close(got.cls, want.cls, rtol=2e-5, atol=2e-5)
    assert not torch.allclose(plain(normalised(x, IMAGENET_MEAN, IMAGENET_STD)).patch, want.patch, atol=1e-2)


def test_mean_and_std_are_those_of_the_weights_and_not_only_of_the_architecture() -> None:
    half = (0.5, 0.5, 0.5)
    assert own_normalisation(Teacher("vit_base_patch16_224")) == (half, half)
    dino = own_normalisation(Teacher("vit_base_patch16_224", weights="hub:timm/vit_base_patch16_224.dino"))
    assert dino == (IMAGENET_MEAN, IMAGENET_STD)
    assert own_normalisation(Teacher("vit_base_patch16_224", weights="file:///x.pth")) == (half, half)


# ---- weights


def test_random_weights_differ_by_teacher_and_never_by_rank() -> None:
    torch.manual_seed(1)
    first = loaded(recipe(a=teacher(), b=teacher()))
    drawn = torch.rand(2)
    torch.manual_seed(1)
    assert torch.rand(2).equal(drawn)
    second = loaded(recipe(b=teacher(), a=teacher()))
    for key in "ab":
        assert all(v.equal(second[key].state_dict()[k]) for k, v in first[key].state_dict().items())
    assert not first["a"].model.pos_embed.equal(first["b"].model.pos_embed)


def test_a_file_that_does_not_fit_is_refused_with_all_keys(tmp_path: Path) -> None:
    model = create(VIT, TINY, None, "teachers.t")
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    save_file(state, tmp_path / "good.safetensors")
    root = f"file://{tmp_path}"
    good = loaded(recipe(t=teacher(weights="store:good.safetensors")), root=root)["t"]
    assert good.model.cls_token.equal(state["cls_token"])
    state["blocks.7.norm1.weight"] = state.pop("blocks.1.norm1.weight")
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError) as error:
        loaded(recipe(t=teacher(weights="store:bad.safetensors")), root=root)
    assert "missing: blocks.1.norm1.weight" in str(error.value)
    assert "unexpected: blocks.7.norm1.weight" in str(error.value)


def test_a_teacher_is_frozen_runs_in_evaluation_mode_and_its_features_can_stand_in_a_loss() -> None:
    made = loaded(recipe(t=teacher(args={"drop_path_rate": 0.5, "proj_drop_rate": 0.5})), dtype=torch.bfloat16)["t"]
    x = pixels()
    first, second = made(x), made(x)
    assert first.cls.equal(second.cls)
    assert first.patch.dtype is torch.float32
    assert not any(p.requires_grad for p in made.parameters())
    assert first.patch.requires_grad is False
    prediction = torch.zeros(2, 24, requires_grad=True)
    F.mse_loss(prediction, one(teacher())(x).cls).backward()
    assert prediction.grad is not None


# ---- what cannot be a teacher


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Teacher("resnet18"), "teachers.t.cls: resnet18 has no class token; use teachers.t.cls=pooled"),
        (Teacher("vit_tiny"), "teachers.t.name: timm has no model 'vit_tiny'"),
        (Teacher("vit_base_patch16_siglip_224"), "teachers.t.cls: .* has no class token; use teachers.t.cls=pooled"),
        (Teacher(VIT, {"dpeth": 2}), "teachers.t: timm cannot build"),
    ],
)
def test_a_network_without_the_features_that_are_asked_for_is_refused(made: Teacher, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe_teachers(recipe(t=made), STUDENT)


def test_a_teacher_without_class_token_gives_its_pooled_feature() -> None:
    made = one(teacher("vit_base_patch16_siglip_224", cls="pooled"))
    assert made(pixels()).cls.shape == (2, 24)
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_siglip_224", num_classes=0)
    assert not describe(model, "s", 224, "x").has_cls
