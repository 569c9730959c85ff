from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from core.config import ConfigError
from core.data.source import DataError, open_source
from core.folder import FileStore
from core.inputs import open_inputs, schedule, stage_steps
from core.recipe import Recipe, Train
from tests import toy


def two_stages(**second: Any) -> Recipe:
    """Toy stages of two epochs of 48 images in batches of 8."""
    stages = {"first": {"steps": 0, "epochs": 2}, "second": {"steps": 0, "epochs": 2, **second}}
    return dataclasses.replace(toy.recipe(), stages=stages)


def test_a_stage_with_data_of_its_own_has_its_own_length_and_epoch(tmp_path: Path) -> None:
    recipe, root = two_stages(data={"samples": 96}), toy.store(tmp_path)
    first, second = (open_inputs(recipe, name, root) for name in recipe.stage_names())
    assert (first.steps, first.method.epoch_steps, len(first.source)) == (12, 6, 48)
    assert (second.steps, second.method.epoch_steps, len(second.source)) == (24, 12, 96)
    assert [stage_steps(recipe, name, root) for name in recipe.stage_names()] == [12, 24]


def test_a_stage_that_learns_labels_loads_no_teachers(tmp_path: Path) -> None:
    method = {"name": "finetune", "options": {"num_classes": 3}}
    recipe = two_stages(method=method, student={"args": {"global_pool": "avg"}})
    first, second = (open_inputs(recipe, name, toy.store(tmp_path)) for name in recipe.stage_names())
    assert sorted(first.teachers) == ["one", "two"]
    assert second.teachers == {}
    assert type(second.method).__name__ == "Finetune"


def test_held_out_images_are_numbered_as_those_that_are_learnt(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    source = open_source(f"{root}/data")
    for i in range(3):
        FileStore(tmp_path / "held").put(f"{source.classes[2 - i % 2]}/{i}.png", bytes(source.read(i).data))
    method = {"name": "finetune", "options": {"num_classes": 3}}
    recipe = two_stages(method=method, data={"heldout": f"file://{tmp_path}/held"})
    recipe.student.args["global_pool"] = "avg"
    held = open_inputs(recipe, "second", root).held
    assert held is not None
    assert held.classes == source.classes
    assert [held.label(i) for i in range(3)] == [1, 2, 2]


def test_what_does_not_fit_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    root = toy.store(tmp_path)
    with pytest.raises(ConfigError, match=r"num_classes: 2, but data\.source has 3 classes"):
        open_inputs(two_stages(method={"name": "finetune", "options": {"num_classes": 2}}), "second", root)
    with pytest.raises(ConfigError, match="more than the 48 images"):
        open_inputs(two_stages(batch=64), "second", root)
    with pytest.raises((DataError, ConfigError), match="nowhere"):
        open_inputs(two_stages(data={"source": "store:nowhere"}), "second", root)


@pytest.mark.parametrize(
    ("warmup_epochs", "per_epoch", "steps"),
    [(1.3, 13, 16), (2.5, 7, 17), (0.7, 5, 3), (3, 4, 12), (0.29, 100, 29), (0.0, 9, 0), (50, 2, 34)],
)
def test_a_warm_up_of_a_part_of_an_epoch_is_rounded_down_to_steps(warmup_epochs, per_epoch, steps) -> None:
    settings = Train(epochs=17, batch=4, micro_batch=4, warmup_epochs=warmup_epochs)
    found, total = schedule(settings, 4 * per_epoch)
    assert (found.warmup_steps, total) == (steps, 17 * per_epoch)
