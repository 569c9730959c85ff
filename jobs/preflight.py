"""What can be told of a recipe before it is queued: its networks fit each other, and its data are enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.recipe import Recipe


def check_networks(recipe: Recipe) -> None:
    """Build student and teachers of every stage without weights or memory.  Raises ConfigError."""
    from core.engine import check_precision
    from core.models.students import describe_student
    from core.models.teachers import describe_teachers
    from core.registry import at_stage, create

    for name in recipe.stage_names():
        settings, own = recipe.stage(name), at_stage(recipe, name)
        check_precision(settings, recipe.zero.stage)
        info = describe_student(own.student, settings.img_size)
        create(own, settings, 1).check(info, describe_teachers(own, info))


def check_data(recipe: Recipe, root: str, beside: bool = True) -> None:
    """The training images are of a known kind and enough for a step of every stage, and, with `beside`, what a method
    reads beside them belongs to them; says what of stored features is lacking.  Raises ConfigError, DataError,
    FeatureError."""
    from core.data.source import passed_over
    from core.inputs import open_inputs

    for name in recipe.stage_names():
        found = open_inputs(recipe, name, root, beside=beside)
        for line in passed_over(found.source):
            print(f"passed over in data.source: {line}", flush=True)
        for note in found.stored.notes:
            print(f"computed in training: {note}", flush=True)
