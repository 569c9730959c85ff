"""Whether the weight files of a recipe go into its networks: names and shapes alone, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from core.models.students import create, describe_student
from core.models.teachers import create_teacher, describe_teachers
from core.models.text import check_text_tower
from core.models.weights import fitted
from core.recipe import Recipe
from core.registry import at_stage


def check_fit(recipe: Recipe, field: str, state: Mapping[str, Any]) -> None:
    """A checkpoint, of which shapes are enough, as the weights of a field: `student.weights`, `teachers.x.weights`
    or `teachers.x.text`.  Raises WeightsError, ConfigError.
    """
    if field.endswith(".text"):
        check_text_tower(state)
        return
    student = field.endswith("student.weights")
    for network in [_student(recipe)] if student else _teachers(recipe, field.split(".")[1]):
        fitted(network, state, fit_positions=student)


def _student(recipe: Recipe) -> nn.Module:
    """The student of the first stage; further ones go on from a checkpoint."""
    first = recipe.stage_names()[0]
    student = recipe.at(first).student
    with torch.device("meta"):
        return create(student.name, student.args, recipe.stage(first).img_size, "student")


def _teachers(recipe: Recipe, key: str) -> Iterator[nn.Module]:
    """A teacher's network for each size of images that it is given; at its own size where no stage runs it."""
    sizes: set[int | None] = set()
    for name in recipe.stage_names():
        own = at_stage(recipe, name)
        if key in own.teachers:
            student = describe_student(own.student, recipe.stage(name).img_size)
            sizes.add(describe_teachers(own, student)[key].img_size)
    for size in sizes or {None}:
        with torch.device("meta"):
            yield create_teacher(recipe.teachers[key], f"teachers.{key}", size)
