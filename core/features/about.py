"""What stored features are of: everything their numbers depend on, and a fingerprint of it that names their place."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from core.data.source import Source
from core.data.views import RandomCrops
from core.features.codec import FeatureError
from core.merge import flatten
from core.methods.base import Info, Method, stored_shapes
from core.models.locate import recorded_digest
from core.models.teachers import own_normalisation
from core.recipe import Recipe, Teacher

if TYPE_CHECKING:
    from core.inputs import Inputs

SCHEMA = 1
Split = Literal["train", "heldout", "texts"]
IMAGES: tuple[Split, ...] = ("train", "heldout")
SPLITS: tuple[Split, ...] = (*IMAGES, "texts")  # all that features are stored of
About = dict[str, Any]  # plain JSON


def fingerprint(about: About) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def differences(one: About, other: About) -> list[str]:
    """Dotted fields in which two differ, with both values."""
    a, b = flatten(one), flatten(other)
    return [
        f"{k}: {a.get(k, 'absent')} and {b.get(k, 'absent')}"
        for k in sorted(a.keys() | b.keys())
        if a.get(k) != b.get(k)
    ]


def describe(inputs: Inputs, split: Split, root: str) -> dict[str, About]:
    """Of every teacher of a stage.  Raises FeatureError where outputs cannot be stored, WeightsError, StoreError."""
    recipe, method = inputs.recipe, inputs.method
    if recipe.data.weights and split == "train":
        raise FeatureError(
            "data.weights: a mixture goes round its small sets, with new crops each time, which no store can hold; use "
            "features=off, or data.merge without weights"
        )
    source = inputs.source if split == "train" else inputs.held
    assert source is not None
    common = {
        "schema": SCHEMA,
        "data": source.fingerprint(),
        "rows": rows(source, recipe, split),
        "images": _drawn(method, recipe) if split == "train" else _clean(method),
        "precision": method.settings.precision,
        "codec": recipe.data.codec,
    }
    return {
        name: common
        | {"teacher": of_teacher(name, recipe.teachers[name], info, root), "outputs": stored_shapes(method, info)}
        for name, info in sorted(inputs.teachers.items())
    }


def rows(source: Source, recipe: Recipe, split: Split) -> int:
    """Samples of a split; the copies of a repeated image have draws of their own, and so outputs."""
    return len(source) * (recipe.data.repeats if split == "train" else 1)


def _drawn(method: Method, recipe: Recipe) -> About:
    """How training images are drawn; view v has the draws of epoch v."""
    crops = method.crops()
    if not isinstance(crops, RandomCrops):
        raise FeatureError(f"method {type(method).__name__}: its crops depend on each other and cannot be stored alone")
    number, view = next((i, v) for i, v in enumerate(method.views()) if v.name == method.teacher_view)
    return {
        "seed": recipe.seed,
        "pixels": recipe.data.pixels,
        "number": number,
        "view": json.loads(json.dumps(asdict(view))),
        **method.pixels(),
    }


def _clean(method: Method) -> About:
    size = next(view.size for view in method.views() if view.name == method.teacher_view)
    return {"clean": method.settings.img_size, "size": size, **method.pixels()}


def of_teacher(name: str, teacher: Teacher, info: Info, root: str) -> About:
    """Raises WeightsError, StoreError."""
    return {
        "model": teacher.name,
        "args": dict(teacher.args),
        "weights": weights_digest(name, teacher.weights, teacher.name, root),
        "cls": teacher.cls,
        "norm": teacher.norm,
        "positions": teacher.positions,
        "normalize": [list(part) for part in own_normalisation(teacher)] if teacher.normalize == "own" else "student",
        "img_size": info.img_size,
    }


def weights_digest(name: str, weights: str, model: str, root: str) -> str:
    """Raises WeightsError, StoreError."""
    return f"random for {name}" if weights == "random" else recorded_digest(weights, model, root)
