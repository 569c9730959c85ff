"""Recipes: typed, strict, resolved in one order, and identified by a fingerprint of what the result depends on.

defaults <- base recipe <- recipe <- profile <- dotlist. Imports no torch, so a login node can read recipes at once;
the options of a method are checked by `core.registry.complete`, which does import it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from core import machine, numerics
from core.limits import check_value
from core.merge import ConfigError as ConfigError
from core.merge import Overlay, TooLarge, flatten, load_yaml, merge, nested, parse, read, to_object, without
from core.merge import nearest as nearest
from core.models import known
from core.models.arguments import check_arguments
from core.recipe import PARTS, SCHEMA, Data, Recipe, Train

RECIPES = Path(__file__).resolve().parent.parent / "jobs" / "recipes"
# Groups that say where and how fast a run goes, not what comes out of it: they are left out of the fingerprint.
NOT_IDENTITY = ("store", "zero", "launch", "loader", "checkpoint", "log", "evaluate", "about")


NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"  # of teachers and stages: part of keys, addresses and module names


def names() -> list[str]:
    """Recipes that come with Retort."""
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load(name: str, profile: str = "", dotlist: list[str] | None = None) -> Recipe:
    """Resolve a recipe by name or by path of a YAML file.

    Raises ConfigError: unknown recipe, profile, key or value, with file, line and the nearest valid name.
    """
    path = _find(name)
    files = _collect(path, seen=())
    layers = [dataclasses.replace(f, values=without(f.values, "base", "profiles")) for f in files]
    layers += _profile(profile, files) if profile else []
    layers += [_override(item) for item in dotlist or []]
    config = OmegaConf.structured(Recipe(name=re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")))
    for layer in layers:
        config = merge(config, Recipe, layer)
        for stage, values in layer.values.get("stages", {}).items():  # judged here, where the line is known
            place = f"stages.{stage}"
            values = layer.below(place, place, values).values
            merge(OmegaConf.structured(Train), Train, layer.below(place, place, without(values, *PARTS)))
            for part in values.keys() & PARTS.keys():
                where = f"{place}.{part}"
                merge(OmegaConf.structured(PARTS[part]), PARTS[part], layer.below(where, where, values[part]))
    recipe = cast(Recipe, to_object(config))
    teachers = {key: known.fill(teacher) for key, teacher in recipe.teachers.items()}
    student = known.fill(recipe.student)
    recipe = dataclasses.replace(recipe, student=student, teachers=teachers, numerics=numerics.CURRENT)
    check(recipe)
    return recipe


def check(recipe: Recipe) -> None:
    """Everything that can be judged from the recipe alone.  Raises ConfigError."""
    if recipe.schema != SCHEMA:
        raise ConfigError(f"schema: this Retort reads recipes of schema {SCHEMA}, not {recipe.schema}")
    if not 0 <= recipe.numerics <= numerics.CURRENT:
        raise ConfigError(
            f"numerics: {recipe.numerics} was written by a newer Retort; this one knows {numerics.CURRENT} changes"
        )
    if not recipe.method.name:
        raise ConfigError("method.name: not set; a recipe names its method, for example `method: {name: unic}`")
    if not re.fullmatch("[a-z0-9][a-z0-9-]*", recipe.name):
        raise ConfigError(f"name: {recipe.name!r} must be made of a-z, 0-9 and -, as it becomes part of addresses")
    if recipe.launch.ranks and recipe.launch.min_ranks > recipe.launch.ranks:
        raise ConfigError(f"launch.min_ranks: {recipe.launch.min_ranks} is above launch.ranks, {recipe.launch.ranks}")
    for group in ("teachers", "stages"):
        for name in getattr(recipe, group):
            if not re.fullmatch(NAME, name):
                raise ConfigError(f"{group}: the name {name!r} must be made of letters, digits, _ and -")
    for name, teacher in recipe.teachers.items():
        check_arguments(teacher.args, f"teachers.{name}")
    flat = flatten(without(to_dict(recipe), "stages"))
    for stage in recipe.stage_names():
        prefix = f"stages.{stage}" if recipe.stages else "train"
        flat |= _check_stage(recipe.stage(stage), prefix)
        own = recipe.at(stage)
        _check_weights(own.data)
        parts = recipe.stages.get(stage, {}).keys() & PARTS.keys()
        check_arguments(own.student.args, f"{prefix}.student" if "student" in parts else "student")
        flat |= flatten({f"{prefix}.{part}": dataclasses.asdict(getattr(own, part)) for part in parts})
    for key, value in flat.items():
        check_value(key, value, PARTS)


def _check_stage(settings: Train, prefix: str) -> dict[str, Any]:
    if settings.micro_batch > 0 and settings.batch % settings.micro_batch:
        raise ConfigError(f"{prefix}.batch: {settings.batch} is not a multiple of micro_batch {settings.micro_batch}")
    if settings.steps == 0 and settings.epochs == 0:
        raise ConfigError(f"{prefix}: neither steps nor epochs is set")
    return {f"{prefix}.{k}": v for k, v in dataclasses.asdict(settings).items()}


def _check_weights(data: Data) -> None:
    if data.weights and len(data.weights) != 1 + len(data.merge):
        numbers, sources = len(data.weights), 1 + len(data.merge)
        advice = "give one for data.source and one for each of data.merge"
        raise ConfigError(f"data.weights: numbers {numbers}, sources {sources}; {advice}")
    for name, given in (("samples", data.samples), ("repeats", data.repeats > 1)):
        if data.weights and given:
            raise ConfigError(
                f"data.{name}: not together with data.weights, which go round small sources by themselves"
            )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    return dataclasses.asdict(recipe)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, loadable again by `from_yaml`; without folders of this machine."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(machine.nowhere(recipe))))


def from_yaml(text: str, file: str = "recipe.yaml") -> Recipe:
    """A resolved recipe as stored in a run folder; it names no folders of this machine.  Raises ConfigError."""
    recipe = machine.nowhere(cast(Recipe, to_object(merge(OmegaConf.structured(Recipe), Recipe, parse(text, file)))))
    check(recipe)
    return recipe


def fingerprint(recipe: Recipe) -> str:
    """Hex digest of all that the result depends on: not world size, ZeRO stage, launcher, store, logging."""
    identity = without(to_dict(recipe), *NOT_IDENTITY, "train", "stages", "numerics")
    if changes := numerics.made_before(recipe):
        identity["numerics"] = changes
    # As a list, because the order of stages matters; resolved, because where a setting is written does not.
    identity["stages"] = [
        [name, *(dataclasses.asdict(x) for x in (recipe.stage(name), *(getattr(recipe.at(name), p) for p in PARTS)))]
        for name in recipe.stage_names()
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


# -- where settings come from -------------------------------------------------------------------------------------


def _find(name: str, folder: Path | None = None) -> Path:
    """A recipe that comes with Retort, or a YAML file by path (a base's path counts from the file that names it)."""
    by_path = name.endswith((".yaml", ".yml"))
    path = (folder or Path()) / name if by_path else RECIPES / f"{name}.yaml"
    if not path.is_file() or not (by_path or name in names()):
        raise ConfigError(
            f"recipe {name!r} not found{nearest(name, names())} (known: {', '.join(names())}; or give the path of a "
            f"YAML file)"
        )
    return path.resolve() if folder else path


def _collect(path: Path, seen: tuple[Path, ...]) -> list[Overlay]:
    """The files of a recipe, its bases first."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base recipes form a circle")
    own = read(path)
    base = own.values.get("base")
    if base is None:
        return [own]
    if not isinstance(base, str):
        raise ConfigError(f"{own.place('base')}: base: give one recipe by name or path, not {base!r}")
    return [*_collect(_find(base, path.parent), (*seen, path.resolve())), own]


def _profile(profile: str, files: list[Overlay]) -> list[Overlay]:
    """The profile that all recipes share, then what the recipe's files add to it."""
    shared = {p.stem: p for p in (RECIPES / "profiles").glob("*.yaml")}
    own = [f.below("profiles", "", f.values.get("profiles")) for f in files]
    if profile not in shared and not any(profile in o.values for o in own):
        known = sorted(shared.keys() | {name for o in own for name in o.values})
        raise ConfigError(
            f"profile {profile!r} not found for {files[-1].file}{nearest(profile, known)} (known: {', '.join(known)})"
        )
    found = [read(shared[profile])] if profile in shared else []
    return found + [o.below(profile, "", o.values[profile]) for o in own if profile in o.values]


def _override(item: str) -> Overlay:
    key, sign, text = item.partition("=")
    if not sign or not all(key.split(".")):
        raise ConfigError(f"SET: {item!r} is not of the form key=value, for example train.steps=100")
    try:
        value = load_yaml(text) if text else ""  # key= empties a field
    except yaml.YAMLError as error:
        why = f": {error}" if isinstance(error, TooLarge) else ""
        raise ConfigError(f"SET {key}: {text[:200]!r} is not a valid YAML value{why}") from None
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        value = float(value)  # YAML 1.1 reads 1e-4 as a string
    return Overlay(nested(key, value), "SET")
