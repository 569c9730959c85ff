"""Evaluate a run: its student, its teachers, untrained students and raw pixels by the protocols of the recipe."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import ConfigError, nearest
from core.data.source import Source
from core.engine import pick_device
from core.evaluate.features import Extractor, FeatureSet, extract
from core.evaluate.labelled import labelled_sources
from core.export import load_student, read_recipe
from core.inputs import shard_cache
from core.methods.base import Features, Info
from core.models.students import build_student, describe_student
from core.models.teachers import FrozenTeacher, describe_teachers, load_teachers
from core.recipe import Recipe
from core.storage import Store

FOLDER = "evaluations"
FLOAT_BYTES, MOST_PIXEL_BYTES = 4, 2 << 30  # raw pixels of larger sets would not fit in memory
Say = Callable[[str], None]


def protocols() -> list[str]:
    """Names of the protocols: files of this folder with a function `probe`."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(f.stem for f in files if "\ndef probe(" in f.read_text())


def check_protocols(names: list[str]) -> None:
    """Raises ConfigError for an unknown protocol, with the nearest valid name."""
    for name in names:
        if name not in protocols():
            raise ConfigError(
                f"evaluate.protocols: unknown protocol {name!r}{nearest(name, protocols())} "
                f"(known: {', '.join(protocols())})"
            )


def evaluate(run: Store, root: str, names: list[str], say: Say) -> dict[str, Any]:
    """Run the protocols, write evaluations/<protocol>.json for each, return {protocol: result}.

    A result has rows {model, top1, top5} in percent, and `margin`: the student's top-1 less the best untrained
    student's, with the points the recipe asks for and whether they were reached.
    Raises ConfigError when the recipe names no labelled images, or the run has no checkpoint.
    """
    recipe = read_recipe(run)
    names = names or recipe.evaluate.protocols
    check_protocols(names)
    sources = labelled_sources(recipe, root, f"{run.uri}/recipe.yaml", shard_cache(recipe.loader))
    device = pick_device(recipe.launch.device)
    features, classes = _features(recipe, run, root, sources, device, say)
    results = {}
    for name in names:
        say(f"evaluating by {name}")
        probe = importlib.import_module(f"core.evaluate.{name}").probe
        rows = [
            {"model": model, **probe(train.to(device), test.to(device), classes, recipe.seed)}
            for model, (train, test) in features.items()
        ]
        results[name] = {"protocol": name, "time": time.time(), "rows": rows, "margin": _margin(recipe, rows),
                         "settings": {"train": recipe.evaluate.train, "test": recipe.evaluate.test, "classes": classes,
                                      "train_images": len(next(iter(features.values()))[0].labels),
                                      "test_images": len(next(iter(features.values()))[1].labels)}}  # fmt: skip
        run.put(f"{FOLDER}/{name}.json", json.dumps(results[name], indent=1, allow_nan=False).encode())
    return results


def _margin(recipe: Recipe, rows: list[dict[str, Any]]) -> dict[str, Any]:
    top1 = {row["model"]: row["top1"] for row in rows}
    best = max(value for model, value in top1.items() if model.startswith("untrained"))
    asked, reached = recipe.evaluate.margin, top1["student"] - best
    return {"asked": asked, "reached": reached, "ok": asked == 0 or reached >= asked}


def _features(
    recipe: Recipe, run: Store, root: str, sources: list[Source], device: torch.device, say: Say
) -> tuple[dict[str, tuple[FeatureSet, FeatureSet]], int]:
    """(train, test) features of every model, and the number of classes."""
    student, _, size = load_student(run)
    recipe = recipe.at(recipe.stage_names()[-1])
    info = describe_student(recipe.student, size)
    models: dict[str, Extractor] = {"student": _student(student.to(device))}
    models |= _teachers(recipe, info, root, device)
    for seed in range(recipe.evaluate.seeds):
        untrained, _ = build_student(replace(recipe.student, weights=""), size, 1000 + seed, root)
        models[f"untrained {seed + 1}"] = _student(untrained.to(device))
    if sum(len(source) for source in sources) * 3 * size**2 * FLOAT_BYTES <= MOST_PIXEL_BYTES:
        models["raw pixels"] = lambda x: x.flatten(1)
    say(f"features of {len(models)} models at {size} px: {', '.join(models)}")
    train, test = (extract(models, source, size, device, workers=recipe.loader.workers) for source in sources)
    return {name: (train[name], test[name]) for name in models}, len(sources[0].classes)


def _student(model: nn.Module) -> Extractor:
    model.eval()

    def extractor(images: Tensor) -> Tensor:
        features: Tensor = model(images)
        return features

    return extractor


def _teachers(recipe: Recipe, info: Info, root: str, device: torch.device) -> dict[str, Extractor]:
    infos = describe_teachers(recipe, info)
    loaded = load_teachers(recipe, info, infos, root, device, torch.float32)
    return {f"teacher {name}": _class_feature(teacher) for name, teacher in loaded.items()}


def _class_feature(teacher: FrozenTeacher) -> Extractor:
    def extractor(images: Tensor) -> Tensor:
        features: Features = teacher(images)
        return features.cls

    return extractor
