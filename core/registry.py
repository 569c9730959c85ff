"""Methods by name: a file of `core/methods`, or of a folder in RETORT_METHODS, whose `METHOD` is the class."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from core.config import ConfigError, nearest
from core.merge import Overlay, merge, to_object
from core.methods.base import Method
from core.recipe import Method as MethodConfig
from core.recipe import Recipe, Train

FOLDER = Path(__file__).parent / "methods"


def _folders() -> list[Path]:
    extra = os.environ.get("RETORT_METHODS", "")  # further folders with method files
    return [FOLDER, *(Path(p) for p in extra.split(os.pathsep) if p)]


def available() -> list[str]:
    names = {p.stem for folder in _folders() for p in folder.glob("*.py")}
    return sorted(n for n in names if n not in ("base", "__init__"))


def find(name: str) -> type[Method]:
    """The method class of this name.  Raises ConfigError with the nearest valid name."""
    if name not in available():
        raise ConfigError(
            f"method.name: unknown method {name!r}{nearest(name, available())} (known: {', '.join(available())})"
        )
    folder = next(f for f in _folders() if (f / f"{name}.py").is_file())
    if folder == FOLDER:
        module = importlib.import_module(f"core.methods.{name}")
    else:
        spec = importlib.util.spec_from_file_location(f"retort_methods.{name}", folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up there
        spec.loader.exec_module(module)
    return cast(type[Method], module.METHOD)


def complete(recipe: Recipe) -> Recipe:
    """The recipe with its method's options checked and filled in.  Raises ConfigError."""
    for teacher in recipe.teachers:
        if not recipe.teachers[teacher].name:
            raise ConfigError(f"teachers.{teacher}.name: not set; give a timm model name")
    for stage in recipe.stage_names():
        method = recipe.at(stage).method
        if find(method.name).uses_teachers(method.options) and not recipe.teachers:
            raise ConfigError(f"teachers: method {method.name} needs at least one teacher")
    stages = {stage: dict(values) for stage, values in recipe.stages.items()}
    for stage in (stage for stage, values in stages.items() if "method" in values):
        stages[stage]["method"] = _completed(recipe.at(stage).method, recipe.name, f"stages.{stage}.")
    return dataclasses.replace(recipe, method=MethodConfig(**_completed(recipe.method, recipe.name)), stages=stages)


def _completed(method: MethodConfig, recipe: str, prefix: str = "") -> dict[str, Any]:
    Options = find(method.name).Options
    overlay = Overlay(method.options, recipe, prefix=f"{prefix}method.options")
    options = dataclasses.asdict(to_object(merge(OmegaConf.structured(Options), Options, overlay)))
    return {"name": method.name, "options": options}


def at_stage(recipe: Recipe, name: str) -> Recipe:
    """`Recipe.at`, without teachers where the stage's method has none."""
    own = recipe.at(name)
    uses = find(own.method.name).uses_teachers(own.method.options)
    return own if uses else dataclasses.replace(own, teachers={})


def create(recipe: Recipe, settings: Train, steps: int, epoch_steps: int = 1) -> Method:
    """The method of a recipe (`Recipe.at` a stage) for one stage."""
    method = find(recipe.method.name)
    made = method(method.Options(**_completed(recipe.method, recipe.name)["options"]), settings, steps)
    made.epoch_steps = epoch_steps
    return made
