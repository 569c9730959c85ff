from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import ConfigError
from core.data.views import IMAGENET_MEAN, IMAGENET_STD
from core.methods.base import Info
from core.models.features import family, last_tokens, stride, take, to_precision
from core.models.students import create, describe
from core.models.teachers import FrozenTeacher, describe_teachers, load_teachers, own_normalisation
from core.models.vit import set_grid
from core.recipe import Recipe, Teacher

torch.set_num_threads(1)

CPU = torch.device("cpu")
SWIN_ARGS = {"img_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
VIT_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
BEIT_ARGS = {**VIT_ARGS, "use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT_ARGS),
    "beit": ("beit_base_patch16_224", {**BEIT_ARGS, "use_fc_norm": False}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN_ARGS),
    "swinv2": ("swinv2_tiny_window8_256", SWIN_ARGS),
    "other": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8] * 4}),
}


def net(kind: str, seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    name, args = NETS[kind]
    model = create(name, {**args, **more}, None, "x").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def pixels(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "size", "want"),
    [
        ("vit", 32, (24, 2, 8, (4, 4), 1, True, True)),
        ("beit", 32, (24, 2, 8, (4, 4), 1, True, False)),
        ("swin", 64, (16, 4, 8, (8, 8), 0, False, False)),
        ("swinv2", 64, (16, 4, 8, (8, 8), 0, False, False)),
        ("other", 64, (8, 0, 0, (0, 0), 0, False, False)),
    ],
)
def test_every_family_is_described(kind: str, size: int, want: tuple[Any, ...]) -> None:
    info = describe(net(kind), "x", size, "x")
    assert (info.dim, info.depth, info.patch, info.grid, info.prefix, info.has_cls, info.is_vit) == want
    assert (info.img_size, info.projection, info.patch) == (size, 0, stride(net(kind)))


@pytest.mark.parametrize("kind", ["vit", "beit", "swin", "swinv2"])
def test_tokens_are_timm_s_before_and_after_the_final_norm(kind: str) -> None:
    model, x = net(kind), pixels(64 if "swin" in kind else 32)
    with torch.no_grad():
        whole = model.forward_features(x)
        torch.testing.assert_close(model.norm(last_tokens(model, x)), whole)
        patches = whole.flatten(1, 2) if whole.ndim == 4 else whole[:, 1:]
        raw = take(model, x, "pooled", norm=False)[1]
        pooled, patch = take(model, x, "pooled")
    torch.testing.assert_close(patch, patches)
    torch.testing.assert_close(model.norm(raw), patch)
    torch.testing.assert_close(pooled, model.forward_head(whole, pre_logits=True))
    assert not torch.allclose(raw, patch)


def test_class_tokens_follow_the_norm_setting() -> None:
    model, x = net("vit"), pixels(32)
    raw = take(model, x, "token", norm=False)[0]
    torch.testing.assert_close(model.norm(raw), take(model, x, "token")[0])
    torch.testing.assert_close(take(model, x, "pooled", norm=False)[0], take(model, x, "pooled")[0])


@pytest.mark.parametrize("kind", ["vit", "swin", "other"])
def test_projected_features_are_timm_s_output_without_a_bias_to_train(kind: str) -> None:
    model = create(NETS[kind][0], {**NETS[kind][1], "num_classes": 5}, None, "x").eval()
    head = model.get_classifier()
    assert not head.bias.any()
    assert not head.bias.requires_grad
    x = pixels(32 if kind == "vit" else 64)
    torch.testing.assert_close(take(model, x, "projected")[0], model(x))
    assert describe(model, "x", x.shape[-1], "x").projection == 5


def test_networks_without_patches_give_a_pooled_feature_and_none() -> None:
    model, x = net("other"), pixels(64)
    cls, patch = take(model, x, "pooled")
    assert (family(model), cls.shape, patch.shape) == ("other", (2, 8), (2, 0, 8))


def test_an_epsilon_of_all_norms_can_be_set_among_the_arguments() -> None:
    model = create("vit_tiny_patch16_224", {**VIT_ARGS, "norm_eps": 1e-3}, None, "x")
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-3}


@pytest.mark.parametrize("kind", ["vit", "swin", "beit"])
def test_what_follows_the_last_block_is_computed_in_float32(kind: str) -> None:
    model, x = net(kind), pixels(64 if kind == "swin" else 32).bfloat16()
    to_precision(model, CPU, torch.bfloat16)
    assert next(model.parameters()).dtype is torch.bfloat16
    with torch.no_grad():
        patch = take(model, x, "pooled")[1]
        raw = last_tokens(model, x)
    want = F.layer_norm(raw.float(), raw.shape[-1:], model.norm.weight, model.norm.bias, model.norm.eps)
    torch.testing.assert_close(patch, want.flatten(1, 2) if kind == "swin" else want[:, 1:], rtol=0, atol=0)
    assert raw.dtype is torch.bfloat16


# ---- as teachers


def teacher(kind: str, **more: Any) -> Teacher:
    return Teacher(NETS[kind][0], NETS[kind][1], "random", cls="pooled" if "swin" in kind else "token", **more)


def loaded(made: Teacher, student: Info) -> FrozenTeacher:
    recipe = Recipe(name="x", teachers={"t": made})
    return load_teachers(recipe, student, describe_teachers(recipe, student), "", CPU, torch.float32)["t"]


def student(grid: int, patch: int) -> Info:
    return Info("s", 24, 2, patch, (grid, grid), 1, has_cls=True, is_vit=True, img_size=grid * patch)


@pytest.mark.parametrize("kind", ["beit", "swin", "swinv2"])
def test_networks_with_relative_positions_are_built_for_the_student_s_grid(kind: str) -> None:
    made = loaded(teacher(kind), student(8, 8))
    features = made(pixels(64))
    assert features.patch.shape[:2] == (2, 64)
    assert made.size is None
    assert loaded(teacher(kind), student(8, 4))(pixels(32)).patch.shape[:2] == (2, 64)


@pytest.mark.parametrize(("rule", "settings"), [("size", {}), ("antialias", {"antialias": True})])
def test_the_position_table_of_another_grid_follows_the_teacher_s_rule(rule: str, settings: dict[str, Any]) -> None:
    released = loaded(teacher("vit"), student(3, 8)).model
    other = loaded(teacher("vit", positions=rule), student(3, 8)).model
    native = loaded(teacher("vit"), student(4, 8)).model.pos_embed
    image = native[:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    want = F.interpolate(image, size=(3, 3), mode="bicubic", **settings).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(other.pos_embed[:, 1:], want)
    assert other.pos_embed[:, :1].equal(native[:, :1])
    assert not torch.allclose(other.pos_embed, released.pos_embed, atol=1e-4)


def test_a_resampled_table_is_used_by_timm_s_own_forward_too() -> None:
    model, x = net("vit"), pixels(24)
    want = last_tokens(model, x)
    set_grid(model, (3, 3))
    assert model.pos_embed.shape == (1, 10, 24)
    torch.testing.assert_close(model.forward_features(x), model.norm(want))


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_a_teacher_s_own_normalisation_is_folded_in_whatever_the_patch_embedding(kind: str) -> None:
    name = "vit_base_patch16_224" if kind == "vit" else "swin_tiny_patch4_window7_224"
    size = 64 if kind == "swin" else 32
    made = Teacher(name, NETS[kind][1], "hub:timm/vit_base_patch16_clip_224.openai", cls="pooled")
    mean, std = own_normalisation(made)
    assert mean != IMAGENET_MEAN
    grid = student(8 if kind == "swin" else 4, 8)
    own, same = (
        FrozenTeacher(
            Teacher(name, NETS[kind][1], made.weights, "pooled", normalize=rule), net(kind).double(),
            describe(net(kind), name, size, "t"), grid,
        ) for rule in ("own", "student")
    )  # fmt: skip
    p = torch.rand(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    given, wanted = (
        (p - torch.tensor(m, dtype=p.dtype).view(1, 3, 1, 1)) / torch.tensor(s, dtype=p.dtype).view(1, 3, 1, 1)
        for m, s in ((IMAGENET_MEAN, IMAGENET_STD), (mean, std))
    )
    torch.testing.assert_close(own(given).patch, same(wanted).patch, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            Teacher("swin_tiny_patch4_window7_224", SWIN_ARGS),
            "teachers.t.cls: .* no class token; use teachers.t.cls=po",
        ),
        (Teacher("vit_tiny_patch16_224", VIT_ARGS, cls="projected"), "projected needs the width .* teachers.t.args"),
        (Teacher("beit_base_patch16_224", {"dpeth": 1}), "teachers.t: timm cannot build"),
        (Teacher("clip-l15"), "teachers.t.name: timm has no model 'clip-l15'; did you mean clip-l14"),
    ],
)
def test_what_a_teacher_cannot_give_is_told_before_anything_is_loaded(made: Teacher, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe_teachers(Recipe(name="x", teachers={"t": made}), student(4, 8))


def test_normalisation_that_cannot_be_folded_is_refused() -> None:
    clip = "hub:timm/convnext_base.clip_laion2b"
    made = Teacher("convnext_atto", NETS["other"][1], clip, cls="pooled", normalize="own")
    with pytest.raises(ConfigError, match="no patch embedding .* use normalize: student"):
        FrozenTeacher(made, net("other"), describe(net("other"), "x", 64, "t"), student(8, 8))
    plain = Teacher("convnext_atto", NETS["other"][1], "random", cls="pooled", normalize="own")  # ImageNet's already
    FrozenTeacher(plain, net("other"), describe(net("other"), "x", 64, "t"), student(8, 8))
