"""Any method, any student, any teachers: refused with the reason before anything is built, or it trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from core.config import ConfigError
from core.methods.base import Batch
from core.models.students import build_student, describe_student
from core.models.teachers import describe_teachers, load_teachers
from core.recipe import Method, Recipe, Student, Teacher, Train
from core.registry import complete, create

torch.set_num_threads(1)

SIZE = 64
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4)}
BEIT = {**VIT, "use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
        "use_fc_norm": False}  # fmt: skip
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "registers": ("vit_tiny_patch16_224", {**VIT, "reg_tokens": 1}),
    "no class token": ("vit_tiny_patch16_224", {**VIT, "class_token": False, "global_pool": "avg"}),
    "finer": ("vit_tiny_patch16_224", {**VIT, "patch_size": 4}),
    "beit": ("beit_base_patch16_224", BEIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "swinv2": ("swinv2_tiny_window8_256", SWIN),
    "clip": ("vit_base_patch32_clip_quickgelu_224", {**VIT, "num_classes": 20}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8] * 4}),
}
STUDENTS = ("vit", "registers", "no class token", "beit", "swin", "swinv2", "clip", "convnext")
# teacher -> how its class feature is taken
TEACHERS = {"vit": "token", "finer": "token", "beit": "token", "swin": "pooled", "clip": "projected",
            "no class token": "pooled", "convnext": "pooled"}  # fmt: skip
# method -> pairs (student, teacher) that train; all others have to be refused
WITH_GRID = {"vit", "finer", "beit", "swin", "no class token"}
TRAINS = {
    "unic": {(s, t) for s in ("vit", "registers", "clip") for t in WITH_GRID},
    "proteus": {(s, t) for s in ("vit", "registers", "clip") for t in WITH_GRID},
    "fd": {(s, t) for s in ("vit", "registers", "clip", "beit") for t in ("vit", "finer", "beit")}
    | {(s, t) for s in ("swin", "swinv2", "no class token") for t in ("swin", "no class token")},
}


OPTIONS = {"unic": {"drop": 0.0}}  # a single teacher cannot be left out


def recipe(method: str, student: str, *teachers: str) -> Recipe:
    def frozen(name: str) -> Teacher:
        network, args = NETWORKS[name]
        return Teacher(network, args if name == "convnext" else {**args, "img_size": 32}, "random", cls=TEACHERS[name])

    named = {name.replace(" ", "-"): frozen(name) for name in teachers}
    own = Method(method, OPTIONS.get(method, {}))
    return complete(Recipe(name="x", method=own, student=Student(*NETWORKS[student]), teachers=named))


def train_once(made: Recipe) -> list[str]:
    """One step's loss and gradients; returns the parameters that stay without a gradient.  Raises ConfigError."""
    settings = Train(img_size=SIZE, epochs=1, batch=4, micro_batch=4, precision="fp32", warmup_steps=1)
    method, info = create(made, settings, 2), describe_student(made.student, SIZE)
    infos = describe_teachers(made, info)
    method.check(info, infos)
    student, _ = build_student(made.student, SIZE, 0, "", method.initialise)
    module = method.build(student, info, infos).train()
    teachers = load_teachers(made, info, infos, "", torch.device("cpu"), torch.float32)
    extra = method.crops()(0, 0, np.arange(4), np.full((4, 2), 80)).extra
    views = {view.name: torch.randn(4, 3, view.size, view.size) for view in method.views()}
    batch = Batch(views, torch.arange(4), extra={key: torch.from_numpy(value) for key, value in extra.items()})
    batch = method.prepare(batch)
    targets = method.targets({key: each(batch.views[method.teacher_view]) for key, each in teachers.items()}, batch)
    loss, _ = method.losses(module(batch), targets, batch)
    loss.backward()
    assert loss.isfinite()
    return [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("method", TRAINS)
def test_a_pair_trains_every_parameter_or_is_refused(method: str, student: str) -> None:
    trained, reasons = set(), []
    for teacher in TEACHERS:
        try:
            assert train_once(recipe(method, student, teacher)) == []
            trained.add((student, teacher))
        except ConfigError as error:
            reasons.append(str(error))
    assert trained == {pair for pair in TRAINS[method] if pair[0] == student}
    assert all(reason.startswith(("student.", "teachers.", "fd ")) for reason in reasons)


@pytest.mark.parametrize("method", TRAINS)
def test_several_teachers_of_different_families_at_once(method: str) -> None:
    assert train_once(recipe(method, "vit", "vit", "finer", "beit")) == []


def test_teachers_are_refused_where_none_is_used() -> None:
    made = replace(recipe("udi", "registers", "vit"), student=Student(*NETWORKS["registers"]))
    with pytest.raises(ConfigError, match="teachers: udi learns from its own average; remove vit"):
        train_once(made)
