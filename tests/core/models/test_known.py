from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from core.config import RECIPES, load
from core.methods.base import Info
from core.models.known import KNOWN, STUDENTS, TEACHERS, fill
from core.models.layouts import LAYOUTS
from core.models.students import create, describe
from core.models.teachers import create_teacher, describe_teachers
from core.recipe import Recipe, Student, Teacher
from jobs import hub

GOLDEN = Path(__file__).parents[2] / "golden"
HUB = "hub:"


def hub_repositories() -> dict[str, str]:
    """Repository of every set of weights that timm knows."""
    configs = {name: timm.get_pretrained_cfg(name) for name in timm.list_pretrained()}
    return {name: config.hf_hub_id for name, config in configs.items() if config and config.hf_hub_id}


@pytest.mark.parametrize("name", KNOWN)
def test_an_entry_can_be_built_names_a_layout_and_proves_what_it_says(name: str) -> None:
    known = KNOWN[name]
    assert known.layout in LAYOUTS
    assert known.weights.startswith((HUB, "store:weights/"))
    assert known.status == ("golden" if known.case else "keys only")
    assert not known.case or (GOLDEN / f"{known.case}.npz").is_file()
    with torch.device("meta"):
        model = create_teacher(fill(Teacher(name=name)), f"teachers.{name}")
    info = describe(model, name, 0, name)
    assert known.cls == "token" if info.has_cls and known.cls != "projected" and known.layout != "dbot_ft" else True
    assert known.cls != "token" or info.has_cls


def test_hub_addresses_are_those_that_timm_has_for_the_model() -> None:
    repositories = hub_repositories()
    for known in KNOWN.values():
        if known.weights.startswith(HUB):
            tagged = {i for name, i in repositories.items() if name.partition(".")[0] == known.timm}
            assert known.weights.removeprefix(HUB) in tagged


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_name_repositories_that_exist(path: Path) -> None:
    repositories = set(hub_repositories().values())
    named = {t.weights for t in load(path.stem).teachers.values() if t.weights.startswith(HUB)}
    assert {hub.source(weights.removeprefix(HUB)) for weights in named} <= repositories


def test_models_without_a_repository_of_their_own_have_their_namesake_s() -> None:
    assert hub.source("timm/vit_base_patch16_clip_quickgelu_224.openai") == "timm/vit_base_patch16_clip_224.openai"
    assert hub.source("timm/vit_base_patch16_224.dino") == "timm/vit_base_patch16_224.dino"
    assert hub.source("somebody/vit_base_patch16_clip_quickgelu_224.openai").startswith("somebody/")
    assert hub.source("timm/unheard_of") == "timm/unheard_of"


def test_a_name_of_the_table_fills_in_what_a_recipe_leaves_open(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "method: {name: unic}\nstudent: {name: proteus-s}\nteachers:\n"
        "  a: {name: dbot-ft-b16}\n  b: {name: clip-l14, weights: random, args: {depth: 2}, licence: mine}\n"
    )
    recipe = load(str(tmp_path / "x.yaml"))
    a, b = recipe.teachers["a"], recipe.teachers["b"]
    assert (a.name, a.cls, a.args) == ("vit_base_patch16_224", "pooled", {"global_pool": "avg"})
    assert a.weights == "store:weights/dbotft_vitbase_16.pth"
    assert (b.name, b.weights, b.licence) == ("vit_large_patch14_clip_quickgelu_224", "random", "mine")
    assert b.args == {"depth": 2}
    assert recipe.student.name == "vit_small_patch14_dinov2"
    assert (recipe.student.weights, recipe.student.args) == ("store:weights/proteus_s.pth", {"init_values": 1.0})
    assert fill(Student(name="vit_tiny_patch16_224")) == Student(name="vit_tiny_patch16_224")


def test_all_upstream_teachers_and_students_of_the_five_methods_are_there() -> None:
    layouts = {known.layout for known in TEACHERS.values()}
    assert layouts == {"dino", "ibot", "timm", "deit3", "dbot_ft", "dinov2", "clip", "synclr", "esvit"}
    assert {known.layout for known in STUDENTS.values()} == {"unic", "proteus", "fd", "dime_fm", "udi"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("dinov2-g14", 1134.8), ("clip-l14", 303.18), ("esvit-swin-b14", 86.92), ("dime-fm-b32", 88.05),
     ("fd-clip-b", 85.67), ("fd-esvit-swin-b", 86.89), ("dime-fm-swin-t", 28.11), ("proteus-s", 21.63)],
)  # fmt: skip
def test_networks_have_the_sizes_of_the_documents(name: str, parameters: float) -> None:
    known = KNOWN[name]
    with torch.device("meta"):
        model = create(known.timm, known.args, None, name)
    table = model.pos_embed if name.startswith("dinov2") else None  # the document counts that of 224 pixels
    own = sum(p.numel() for key, p in model.named_parameters() if key not in ("head.bias", "head.fc.bias"))
    if table is not None:
        own -= table.numel() - 257 * table.shape[-1]
    assert own / 1e6 == pytest.approx(parameters, abs=0.06)


def test_teachers_of_other_patch_sizes_meet_the_student_s_grid() -> None:
    student = Info("s", 384, 12, 14, (16, 16), 1, has_cls=True, is_vit=True, img_size=224)
    teachers = {name: fill(Teacher(name=name)) for name in ("dinov2-s14", "clip-b16", "deit3-b16", "dbot-ft-b16")}
    infos = describe_teachers(Recipe(name="x", teachers=teachers), student)
    assert {info.grid for info in infos.values()} == {(16, 16)}
    assert infos["dinov2-s14"].img_size == 224
    assert infos["clip-b16"].img_size == 256
