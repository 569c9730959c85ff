"""The exported student loads with plain timm, and says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
from safetensors.torch import load

from core.config import ConfigError, to_yaml
from core.evaluate.run import evaluate
from core.export import export, verify
from core.storage import open_store
from core.train import train
from tests import toy
from tests.ranks import run_ranks


def _run(recipe: object, root: str) -> None:
    train(recipe, open_store(f"{root}/runs/one"), root, 1, lambda row: None, lambda: False)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("export")
    recipe = toy.recipe(evaluate={"train": "store:data", "test": "store:data", "seeds": 2}, zero={"stage": 3})
    uri = toy.store(folder)
    open_store(f"{uri}/runs/one").put("recipe.yaml", to_yaml(recipe).encode())
    run_ranks(_run, 2, recipe, uri)
    return uri


def test_plain_timm_loads_it_strictly_and_its_features_are_the_students(root: str) -> None:
    run = open_store(f"{root}/runs/one")
    assert sorted(export(run, root, ["timm"])) == [
        f"{run.uri}/export/{n}" for n in ("README.md", "config.json", "model.safetensors")
    ]
    arguments = json.loads(run.get("export/config.json"))
    model = timm.create_model(arguments.pop("model_name"), **arguments)
    model.load_state_dict(load(run.get("export/model.safetensors")), strict=True)
    assert verify(run) == 0.0


def test_the_model_card_shows_how_to_load_it_and_the_teachers_licences(root: str) -> None:
    run = open_store(f"{root}/runs/one")
    export(run, root, ["timm"])
    card = run.get("export/README.md").decode()
    assert "timm.create_model('vit_tiny_patch16_224'" in card
    assert "one: vit_tiny_patch16_224, licence unknown" in card


def test_a_run_without_a_checkpoint_and_an_unknown_format_are_refused(root: str) -> None:
    empty = open_store(f"{root}/runs/empty")
    empty.put("recipe.yaml", to_yaml(toy.recipe()).encode())
    with pytest.raises(ConfigError, match="no complete checkpoint yet"):
        export(empty, root, ["timm"])
    with pytest.raises(ConfigError, match="'tim' is not one of"):
        export(empty, root, ["tim"])


def test_evaluation_compares_student_teachers_untrained_ones_and_pixels(root: str) -> None:
    run = open_store(f"{root}/runs/one")
    found = evaluate(run, root, ["knn"], lambda text: None)["knn"]
    models = [row["model"] for row in found["rows"]]
    assert models == ["student", "teacher one", "teacher two", "untrained 1", "untrained 2", "raw pixels"]
    assert (
        found["rows"][-1]["top1"] == 100.0 or found["rows"][-1]["top1"] > 30.0
    )  # trained and tested on the same images
    assert json.loads(run.get("evaluations/knn.json"))["rows"] == found["rows"]
    with pytest.raises(ConfigError, match="knnn.*did you mean knn"):
        evaluate(run, root, ["knnn"], lambda text: None)
