from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from core.config import ConfigError, to_yaml
from core.data.decode import decode
from core.data.shards import write_shards
from core.data.source import open_source
from core.evaluate.run import check_protocols, evaluate, protocols
from core.models.students import build_student
from core.recipe import Recipe
from core.storage import Store, open_store
from core.train import train
from tests import toy
from tests.ranks import run_ranks

CLASSES = ["a", "b", "c"]
MODELS = ["student", "teacher one", "teacher two", "untrained 1", "untrained 2", "raw pixels"]


def recipe(**evaluation: Any) -> Recipe:
    given = {"train": "store:labelled/train", "test": "store:labelled/test", "seeds": 2, **evaluation}
    return toy.recipe(train={"steps": 1}, evaluate=given)


def trained(root: str, wanted: Recipe, name: str) -> None:
    train(wanted, open_store(f"{root}/runs/{name}"), root, 1, lambda row: None, lambda: False)


def labelled(root: str) -> None:
    """Thirty plus twelve images whose class is their brightness, beside the noise that is trained on."""
    noise = [open_source(f"{root}/data").read(i) for i in range(42)]

    def samples(part: range) -> Iterator[tuple[str, bytes, str, int]]:
        for i in part:
            pixels = decode(bytes(noise[i].data)).permute(1, 2, 0).numpy().astype(np.float32)
            buffer = io.BytesIO()
            Image.fromarray((pixels / 8 + 100 * (i % 3)).astype(np.uint8)).save(buffer, "PNG")
            yield f"{i:03d}", buffer.getvalue(), "png", i % 3

    for name, part in (("train", range(30)), ("test", range(30, 42))):
        write_shards(samples(part), open_store(root), f"labelled/{name}", 10**6, CLASSES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = toy.store(tmp_path_factory.mktemp("store"))
    labelled(root)
    run_ranks(trained, 1, root, recipe(), "run")
    return root


def run_with(root: str, wanted: Recipe) -> Store:
    """The trained run with another recipe's evaluation, which is no part of what it was trained by."""
    run = open_store(f"{root}/runs/run")
    run.put("recipe.yaml", to_yaml(wanted).encode())
    return run


def test_student_teachers_untrained_students_and_pixels_are_compared_by_every_protocol(root: str) -> None:
    torch.set_num_threads(1)
    said: list[str] = []
    run = run_with(root, recipe(margin=3.0))
    results = evaluate(run, root, [], said.append)
    assert sorted(results) == ["knn", "linear"]
    for name, result in results.items():
        assert [row["model"] for row in result["rows"]] == MODELS
        assert all(0 <= row["top1"] <= row["top5"] <= 100 for row in result["rows"])
        assert all(row["top5"] == 100 for row in result["rows"]), "of three classes"
        assert (result["settings"]["train_images"], result["settings"]["test_images"]) == (30, 12)
        top1 = {row["model"]: row["top1"] for row in result["rows"]}
        assert top1["raw pixels"] == 100, "brightness is there to be seen"
        margin = top1["student"] - max(top1["untrained 1"], top1["untrained 2"])
        assert result["margin"] == {"asked": 3.0, "reached": margin, "ok": margin >= 3.0}
        assert json.loads(run.get(f"evaluations/{name}.json")) == result
    assert any("linear" in line for line in said)


def test_one_protocol_can_be_asked_for_and_a_margin_of_zero_asks_for_nothing(root: str) -> None:
    results = evaluate(run_with(root, recipe()), root, ["knn"], lambda text: None)
    assert list(results) == ["knn"]
    assert results["knn"]["margin"]["ok"] is True


def test_untrained_students_are_untrained_also_where_the_student_began_with_weights(root: str, tmp_path: Path) -> None:
    constant, _ = build_student(recipe().student, 16, 0, "")
    state = {k: torch.zeros_like(v) for k, v in constant.state_dict().items()}  # every image gives the same feature
    save_file(state, tmp_path / "zeros.safetensors")
    wanted = recipe()
    wanted.student.weights = f"file://{tmp_path}/zeros.safetensors"
    run_ranks(trained, 1, root, wanted, "from weights")
    run = open_store(f"{root}/runs/from weights")
    run.put("recipe.yaml", to_yaml(wanted).encode())
    from_weights, from_scratch = (
        [row for row in evaluate(r, root, ["knn"], lambda text: None)["knn"]["rows"] if "untrained" in row["model"]]
        for r in (run, run_with(root, recipe()))
    )
    assert len(from_weights) == 2
    assert from_weights == from_scratch


def test_protocols_are_the_files_that_have_a_probe() -> None:
    assert protocols() == ["knn", "linear"]
    with pytest.raises(ConfigError, match=r"unknown protocol 'kn'; did you mean knn\? \(known: knn, linear\)"):
        check_protocols(["linear", "kn"])


@pytest.mark.parametrize("field", ["train", "test"])
def test_evaluation_without_labelled_images_says_which_and_how(root: str, field: str) -> None:
    with pytest.raises(ConfigError, match=rf'evaluate.{field}: not set .* SET="evaluate.{field}='):
        evaluate(run_with(root, recipe(**{field: ""})), root, ["knn"], lambda text: None)


def test_images_without_labels_or_with_other_classes_are_refused(root: str) -> None:
    store, source = open_store(root), open_source(f"{root}/labelled/test")
    raws = [source.read(i) for i in range(len(source))]
    write_shards(((r.key, r.data, "png", -1) for r in raws), store, "bare", 10**6, [])
    write_shards(((r.key, r.data, "png", r.label) for r in raws), store, "renamed", 10**6, ["a", "b", "d"])
    for raw in raws[:4]:
        store.put(f"stray/{'abc'[raw.label]}/{raw.key}.png", bytes(raw.data))
    store.put("stray/lost.png", bytes(raws[0].data))
    for address, message in (("bare", "store:bare has no labels"), ("renamed", "have different classes"),
                             ("stray", "some images have no label")):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            evaluate(run_with(root, recipe(test=f"store:{address}")), root, ["knn"], lambda text: None)
