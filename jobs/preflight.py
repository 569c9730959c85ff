"""What can be told of a recipe before it is queued: its networks fit each other, and its data are enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

from core.storage import resolve
from jobs import inputs

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


def check_evaluation(recipe: Recipe, root: str) -> str:
    """Say of how many classes the evaluation's images are, or why that is not known yet.

    Raises ConfigError, DataError: what `make eval` would refuse when the run is over.
    """
    wanted = recipe.evaluate.train, recipe.evaluate.test
    if not any(wanted):
        return "none is asked for"
    made = [uri for uri in wanted if uri in inputs.provided(recipe)]
    if any(inputs.is_empty(resolve(uri, root)) for uri in made):
        return "its images are made by submit"
    from core.evaluate.labelled import check_labels, labelled_sources

    sources = labelled_sources(recipe, root, "the recipe")
    check_labels(recipe, sources)
    train, test = map(len, sources)
    return f"{train} training and {test} test images of {len(sources[0].classes)} classes"


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
