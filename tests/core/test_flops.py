"""FLOPs from shapes agree with torch's counter on the real forward passes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.config import load, names
from core.flops import network_flops, stage_cost
from core.methods.base import Batch
from core.models.features import take
from core.models.students import create as create_model
from core.models.students import describe
from core.models.teachers import describe_teachers
from core.registry import at_stage, complete, create


def _counted(run: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        run()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    ("name", "stage"), [("demo", "main"), ("unic-b", "main"), ("unic-l", "s336")]
)
def test_student_ladder_and_teachers_agree_with_the_counter_within_a_percent(name: str, stage: str) -> None:
    recipe = complete(load(name))
    settings, cost = recipe.stage(stage), stage_cost(recipe, stage)
    with torch.device("meta"):
        student = create_model(recipe.student.name, recipe.student.args, settings.img_size, "student")
        info = describe(student, recipe.student.name, settings.img_size, "student")
        infos = describe_teachers(recipe, info)
        module = create(recipe, settings, 1).build(student, info, infos).eval()
        images = torch.empty(1, 3, settings.img_size, settings.img_size)
        assert cost.student + cost.heads == pytest.approx(_counted(lambda: module(Batch({"image": images}))), rel=0.01)
        for key, teacher in recipe.teachers.items():
            model = create_model(teacher.name, teacher.args, None, key).eval()
            size = infos[key].grid[0] * infos[key].patch
            seen = torch.empty(1, 3, size, size)
            counted = _counted(lambda m=model, x=seen, c=teacher.cls: take(m, x, c))
            assert cost.teachers[key] == pytest.approx(counted, rel=0.01)


ALL = [(name, stage) for name in names() for stage in load(name).stage_names()]


@pytest.mark.parametrize(("name", "stage"), ALL)
def test_trained_part_of_every_recipe_agrees_with_the_counter_within_a_percent(name: str, stage: str) -> None:
    """At toy size, on real tensors: what masks and crops let through depends on their values."""
    whole = complete(load(name, "" if name == "demo" else "smoke"))
    recipe, settings, cost = at_stage(whole, stage), whole.stage(stage), stage_cost(whole, stage)
    student = create_model(recipe.student.name, recipe.student.args, settings.img_size, "student")
    info = describe(student, recipe.student.name, settings.img_size, "student")
    method, count = create(recipe, settings, 10), settings.micro_batch
    module = method.build(student, info, describe_teachers(recipe, info)).eval()
    seen = torch.randn(2, 3, settings.img_size, settings.img_size)
    views = {view.name: torch.randn(count, 3, view.size, view.size) for view in method.views()}
    cropped = method.crops()(1, 0, np.arange(count), np.full((count, 2), 2 * settings.img_size))
    extra = {key: torch.from_numpy(array) for key, array in cropped.extra.items()}
    batch = method.prepare(Batch(views, torch.arange(count), labels=torch.zeros(count, dtype=torch.int64), extra=extra))
    once = 2 * _counted(lambda: student(seen[:1])) - _counted(lambda: student(seen[:2]))  # whatever the batch
    assert cost.student + cost.heads == pytest.approx((_counted(lambda: module(batch)) - once) / count, rel=0.01)


def test_unic_costs_what_the_method_notes_say() -> None:
    cost = stage_cost(complete(load("unic-b")), "main")
    assert cost.step == pytest.approx(0.330e12, rel=0.01)
    assert cost.heads == pytest.approx(2 * 13.94e9, rel=0.01)
    assert cost.head_params == 141_723_648


def test_a_network_without_plain_vit_blocks_is_counted_by_running_it() -> None:
    with torch.device("meta"):
        swin = create_model("swin_tiny_patch4_window7_224", {}, 224, "student")
        info = describe(swin, "swin_tiny_patch4_window7_224", 224, "student")
        assert not info.is_vit
        assert network_flops(swin, info, 224) == pytest.approx(2 * 4.5e9, rel=0.05)
