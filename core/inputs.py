"""What one stage reads and trains, opened and checked against each other before anything is built or queued."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from core import machine
from core.cache import ShardCache
from core.config import ConfigError
from core.data.features import Beside, FeatureSource
from core.data.loader import Companion, steps_per_epoch
from core.data.source import Source, open_source
from core.data.subset import composed_by, training_source
from core.engine import check_precision
from core.features.about import IMAGES, Split
from core.features.stored import Available, available
from core.methods.base import Info, Method, Vectors
from core.models.students import describe_student
from core.models.teachers import describe_teachers
from core.private import own_folder
from core.recipe import Loader, Recipe, Teacher, Train
from core.registry import at_stage, create
from core.storage import resolve


@dataclass(frozen=True)
class Inputs:
    """Of one stage; everything fits together."""

    name: str  # of the stage
    recipe: Recipe  # as the stage sees it
    settings: Train
    steps: int
    source: Source
    held: Source | None  # held-out images
    info: Info
    teachers: dict[str, Info]
    method: Method
    clips: dict[str, Teacher]  # all teachers of the recipe, of which the stage may load none
    vectors: tuple[Vectors, ...]  # that the method reads of them
    companions: list[Companion]
    held_companions: list[Companion]
    stored: Available


def open_inputs(recipe: Recipe, name: str, root: str, cache: ShardCache | None = None, beside: bool = True) -> Inputs:
    """Indexes and tables are read, no weights.  Raises ConfigError, DataError, StoreError.

    beside: with what comes beside the images in training; without, where that is to be made.
    """
    own = at_stage(recipe, name)
    check_precision(recipe.stage(name), recipe.zero.stage)
    source = training_source(own.data, recipe.seed, root, cache)
    held = open_source(resolve(own.data.heldout, root), cache) if own.data.heldout else None
    settings, steps = schedule(recipe.stage(name), len(source))
    info = describe_student(own.student, settings.img_size)
    teachers = describe_teachers(own, info)
    method = create(own, settings, steps, steps_per_epoch(len(source), settings.batch, settings.micro_batch))
    method.check(info, teachers)
    _check_labels(method, source, held)
    kinds = type(method).reads_vectors(own.method.options)
    found = Inputs(name, own, settings, steps, source, held, info, teachers, method, recipe.teachers, kinds, [], [],
                   Available())  # fmt: skip
    if not beside:
        return found
    stored = available(found, root, cache)
    companions = _companions(found, stored.vectors, root)
    more = [companions[i] + stored.companions(found, split) for i, split in enumerate(IMAGES)]
    return dataclasses.replace(found, companions=more[0], held_companions=more[1], stored=stored)


def stage_steps(recipe: Recipe, name: str, root: str, cache: ShardCache | None = None) -> int:
    """Optimiser steps of another stage of the run."""
    return schedule(recipe.stage(name), len(training_source(recipe.at(name).data, recipe.seed, root, cache)))[1]


def schedule(settings: Train, samples: int) -> tuple[Train, int]:
    """Steps of a stage, and its settings with the warm-up in steps.  Raises ConfigError when the data are too few."""
    per_epoch = steps_per_epoch(samples, settings.batch, settings.micro_batch)
    if per_epoch == 0:
        raise ConfigError(
            f"train.batch: {settings.batch} is more than the {samples} images of data.source; use a smaller batch"
        )
    steps = settings.steps or settings.epochs * per_epoch
    # Rounded down as in the releases; of the decimal number in the recipe, so that 0.29 epochs of 100 steps are 29.
    by_epochs = math.floor(Fraction(str(settings.warmup_epochs)) * per_epoch)
    warmup = settings.warmup_steps if settings.warmup_steps >= 0 else by_epochs
    return dataclasses.replace(settings, warmup_steps=min(warmup, steps)), steps


def _check_labels(method: Method, source: Source, held: Source | None) -> None:
    """Raises ConfigError where a method lacks labels or has too few outputs for them."""
    method.check_labels(len(source.classes), "data.source")
    if held is not None:
        method.check_labels(len(held.classes), "data.heldout")


def _companions(
    inputs: Inputs, vectors: Mapping[Split, FeatureSource], root: str
) -> tuple[list[Companion], list[Companion]]:
    """What the method reads beside the images, and beside the held-out ones.  Raises DataError, StoreError."""
    method, data, s = inputs.method, inputs.recipe.data, inputs.settings
    images, texts = (resolve(uri or data.source, root) for uri in (data.features, data.texts))
    beside = Beside(inputs.source, images, texts, inputs.recipe.seed, s.batch // s.micro_batch, s.micro_batch,
                    method.epoch_steps, composed_by(data), stored_images=vectors.get("train"),
                    stored_texts=vectors.get("texts"))  # fmt: skip
    if inputs.held is None:
        return method.companions(beside), []
    held_out = dataclasses.replace(beside, source=inputs.held, images=resolve(data.heldout, root), composed="",
                                   training=False, stored_images=vectors.get("heldout"))  # fmt: skip
    return method.companions(beside), method.companions(held_out)


def shard_cache(loader: Loader) -> ShardCache:
    """The node's cache: where the command or this machine says, else a temporary folder of this user's.

    Raises StoreError where that is not a cache of this user's.
    """
    given = machine.folder(machine.CACHE, loader.cache_dir)
    cache = ShardCache(Path(given) if given else own_folder("shards"), int(loader.cache_gb * 1e9), loader.ahead)
    cache.check()
    return cache
