"""What can be told of a recipe before it is queued: its networks fit each other, its weights go into them, and its data
are enough."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from core.storage import MissingObject, StoreError, resolve
from jobs import hub, inputs
from jobs.errors import redact

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


def check_weights(recipe: Recipe, root: str) -> list[str]:
    """Compare names and shapes of every weight file that is there with the network that it is for.

    Few bytes are read, of local files and of others.  Returns what could not be compared, and why; raises WeightsError
    with all that do not fit.
    """
    from core.models.fit import check_fit
    from core.models.locate import one_of_several
    from core.models.weights import WeightsError

    unfit, unknown, fields = [], [], list(_weights(recipe))
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda each: _outline(each[1], each[2], root), fields))
    for (field, _, weights), state in zip(fields, found, strict=True):
        try:
            if isinstance(state, Exception):
                raise state
            check_fit(recipe, field, state)
        except WeightsError as error:
            place = "" if weights in str(error) else f"{weights}: "
            unfit.append(f"{field}: {place}{error}{one_of_several(weights)}")
        except MissingObject:  # told as missing, or yet to be made
            continue
        except StoreError as error:
            unknown.append(redact(f"{field}: not compared with its network: {error}"))
    if unfit:
        raise WeightsError("\n".join(unfit))
    return unknown


def _weights(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(field, timm model, weights) of all files, those of text towers too."""
    texts = ((f"teachers.{name}.text", teacher.name, teacher.text) for name, teacher in recipe.teachers.items())
    for field, model, weights in [*inputs.weights_fields(recipe), *texts]:
        if weights not in ("", "random"):
            yield field, model, weights


def _outline(model: str, weights: str, root: str) -> dict[str, Any] | Exception:
    """A checkpoint's names and shapes, or why they cannot be had."""
    from core.models.locate import outline, weights_uri
    from core.models.weights import WeightsError

    try:
        uri, repository = weights_uri(weights, model, root), hub.hub_id(model, weights)
        if repository and inputs.probe(root).size(hub.staged_key(repository)) is None:
            return hub.outline(repository)
        return outline(uri, inputs.probe)
    except (WeightsError, StoreError) as error:
        return error


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
