"""The finished student as a file that plain timm loads: weights as safetensors, its configuration, a model card."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from core import checkpoint, retention, small_json
from core.config import ConfigError, fingerprint, from_yaml
from core.models.students import build_arguments
from core.models.students import create as create_model
from core.models.variants import own_arguments
from core.models.weights import load_strict
from core.recipe import Recipe
from core.registry import create
from core.storage import Store

FOLDER = "export"


def read_recipe(run: Store) -> Recipe:
    return from_yaml(run.get("recipe.yaml").decode(), f"{run.uri}/recipe.yaml")


def load_student(run: Store) -> tuple[nn.Module, dict[str, Any], int]:
    """The student of a run's newest checkpoint, arguments of `timm.create_model` that build it, its images' pixels.

    Raises ConfigError when the run has no checkpoint yet.
    """
    recipe = read_recipe(run)
    manifest = checkpoint.newest(run, [fingerprint(recipe), *recipe.checkpoint.accept])
    if manifest is None:
        raise ConfigError(f"{run.uri} has no complete checkpoint yet: wait for the first one (checkpoint.every_steps)")
    stage = manifest.position.stage
    settings, recipe = recipe.stage(stage), recipe.at(stage)
    with retention.hold(run, manifest.number):
        reader = checkpoint.Reader(run, manifest)
        weights, state = reader.model(), reader.whole("method")
    arguments = build_arguments(recipe.student.name, recipe.student.args, settings.img_size)
    model = create_model(recipe.student.name, recipe.student.args, settings.img_size, "student")
    load_strict(model, create(recipe, settings, 1).export(weights, state))
    return model.eval(), {"model_name": recipe.student.name, "num_classes": 0, **arguments}, settings.img_size


def export_timm(run: Store) -> list[str]:
    """model.safetensors, config.json (arguments of create_model), README.md under export/.  Returns their addresses.

    Raises ConfigError for a network that timm alone cannot build.
    """
    student = read_recipe(run).student
    if own := [f"student.args.{key}" for key in own_arguments(student.name, student.args) if key != "norm_eps"]:
        raise ConfigError(
            f"{own[0]}: timm has no such {student.name}; a stage or a recipe takes these weights as run:<id>"
        )
    model, arguments, size = load_student(run)
    weights = {k: v.detach().to(torch.float32).contiguous() for k, v in model.state_dict().items()}
    files = {
        "model.safetensors": to_safetensors(weights, metadata={"format": "pt"}),
        "config.json": json.dumps(arguments, indent=1, sort_keys=True).encode(),
        "README.md": _card(run, arguments, size, int(cast(Any, model).num_features)).encode(),
    }
    for name, data in files.items():
        run.put(f"{FOLDER}/{name}", data)
    return [f"{run.uri}/{FOLDER}/{name}" for name in files]


FORMATS: dict[str, Callable[[Store], list[str]]] = {"timm": export_timm, "safetensors": export_timm}


def export(run: Store, root: str, formats: list[str]) -> list[str]:
    """Write every format asked for; returns the addresses.  Raises ConfigError for an unknown one."""
    unknown = [f for f in formats if f not in FORMATS]
    if unknown:
        raise ConfigError(f"FORMAT: {unknown[0]!r} is not one of {', '.join(FORMATS)}")
    return sorted({uri for f in formats for uri in FORMATS[f](run)})


def _card(run: Store, arguments: dict[str, Any], size: int, dim: int) -> str:
    recipe = read_recipe(run)
    teachers = "\n".join(f"- {key}: {t.name}, licence {t.licence}" for key, t in sorted(recipe.teachers.items()))
    options = ", ".join(f"{k}={v!r}" for k, v in arguments.items() if k != "model_name")
    return f"""---
library_name: timm
tags: [image-feature-extraction, distillation, {recipe.method.name}]
---
# {recipe.name}: {recipe.student.name} distilled with {recipe.method.name}

Made by Retort, run `{run.uri.rpartition("/")[2]}`, recipe fingerprint `{fingerprint(recipe)[:16]}`.
Images have {size} x {size} pixels and are normalised with ImageNet's mean and std.

```python
import timm
from safetensors.torch import load_file
model = timm.create_model({arguments["model_name"]!r}, {options})
model.load_state_dict(load_file("model.safetensors"), strict=True)
features = model.eval()(images)  # (B, {dim})
```

Teachers (their licences may bind what is derived from them):
{teachers or "- none"}
"""


def verify(run: Store) -> float:
    """Load the exported file with plain timm and compare features with the run's student: the largest difference."""
    import timm
    from safetensors.torch import load

    student, _, size = load_student(run)
    arguments = small_json.read(run, f"{FOLDER}/config.json", dict)
    plain = timm.create_model(arguments.pop("model_name"), **arguments)
    plain.load_state_dict(load(run.get(f"{FOLDER}/model.safetensors")), strict=True)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        difference = (plain.eval()(images) - student(images)).abs().max()
    return float(difference)
