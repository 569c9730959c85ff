from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from core.checkpoint import Reader, newest
from core.config import ConfigError, from_yaml, to_yaml
from core.export import export, load_student, verify
from core.manifest import CheckpointError
from core.models.students import build_student
from core.recipe import Recipe, Student
from core.registry import complete
from core.storage import Store, open_store
from core.train import train
from tests import toy
from tests.ranks import run_ranks

SECRET = "VerySecretAccessKey0123"


def staged() -> Recipe:
    """Two short stages, and addresses that should not get around."""
    wanted = toy.recipe(evaluate={"train": f"s3://me:{SECRET}@inner-bucket/labels"})
    wanted.stages = {"small": {"img_size": 16, "steps": 1}, "large": {"img_size": 24, "steps": 1}}
    return complete(from_yaml(to_yaml(wanted)))


def trained(root: str) -> None:
    run = open_store(f"{root}/runs/toy-1")
    run.put("recipe.yaml", to_yaml(staged()).encode())
    train(staged(), run, root, 1, lambda row: None, lambda: False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = toy.store(tmp_path_factory.mktemp("store"))
    run_ranks(trained, 1, root)
    export(open_store(f"{root}/runs/toy-1"), root, ["timm"])
    return root


@pytest.fixture
def run(root: str) -> Store:
    return open_store(f"{root}/runs/toy-1")


@pytest.fixture
def folder(root: str) -> Path:
    return Path(f"{root[7:]}/runs/toy-1/export")


def test_plain_timm_loads_the_export_strictly_and_computes_the_student_s_features(run: Store, folder: Path) -> None:
    arguments: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert arguments["img_size"] == 24, "of the last stage"
    model = timm.create_model(arguments.pop("model_name"), **arguments)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    student, _, size = load_student(run)
    images = torch.rand(2, 3, size, size)
    with torch.no_grad():
        assert model.eval()(images).equal(student(images))
    assert verify(run) == 0.0


def test_the_export_is_the_newest_checkpoint_s_encoder_and_nothing_else(run: Store, folder: Path) -> None:
    manifest = newest(run)
    assert manifest is not None
    weights = Reader(run, manifest).model()
    exported = load_file(folder / "model.safetensors")
    assert {f"encoder.{name}" for name in exported} == {name for name in weights if name.startswith("encoder.")}
    assert all(weights[f"encoder.{name}"].equal(value) for name, value in exported.items())
    fresh, _ = build_student(staged().student, 24, staged().seed, "")
    assert not exported["blocks.0.mlp.fc1.weight"].equal(fresh.state_dict()["blocks.0.mlp.fc1.weight"])


def test_a_difference_between_file_and_student_is_seen(run: Store, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder.parent, tmp_path / "run")
    state = load_file(folder / "model.safetensors")
    save_file({**state, "norm.bias": state["norm.bias"] + 0.01}, tmp_path / "run" / "export" / "model.safetensors")
    assert verify(open_store(f"file://{tmp_path}/run")) == pytest.approx(0.01, rel=1e-3)


def test_the_card_s_own_lines_load_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {"images": torch.rand(3, 3, 24, 24)}
    exec(code, names)
    dim = int(re.findall(r"\(B, (\d+)\)", code)[0])
    assert names["features"].shape == (3, dim)


def test_the_card_names_lineage_and_licences_and_no_place_or_credential(root: str, folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for word in ("run `toy-1`", "unic", "- one: vit_tiny_patch16_224, licence unknown", "24 x 24 pixels"):
        assert word in card
    for file in ("README.md", "config.json", "model.safetensors"):
        content = (folder / file).read_bytes()
        assert not any(word.encode() in content for word in (SECRET, "inner-bucket", "s3://", root, root[7:]))


def test_an_unknown_format_is_refused_with_the_known_ones(run: Store, root: str) -> None:
    with pytest.raises(ConfigError, match="FORMAT: 'onxn' is not one of timm, safetensors"):
        export(run, root, ["timm", "onxn"])


def test_a_network_that_timm_alone_cannot_build_is_refused(run: Store, root: str, tmp_path: Path) -> None:
    other = open_store(f"file://{tmp_path}/runs/toy-1")
    recipe = staged()
    recipe.student = Student("beit_base_patch16_224", {"class_token": False})
    other.put("recipe.yaml", to_yaml(recipe).encode())
    with pytest.raises(ConfigError, match="student.args.class_token: timm has no such beit_base_patch16_224"):
        export(other, root, ["timm"])


def test_a_run_without_a_checkpoint_is_told_to_wait(root: str, tmp_path: Path) -> None:
    run = open_store(f"file://{tmp_path}")
    run.put("recipe.yaml", to_yaml(staged()).encode())
    with pytest.raises(ConfigError, match="has no complete checkpoint yet: wait for the first one"):
        export(run, root, ["timm"])


def test_damaged_weights_are_never_exported(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder.parent, tmp_path / "run")
    run = open_store(f"file://{tmp_path}/run")
    manifest = newest(run)
    assert manifest is not None
    piece = next(s for s in manifest.slices if s.kind == "weight" and s.name == "encoder.cls_token")
    data = bytearray(run.get(f"{manifest.key}/{piece.file}"))
    data[piece.offset] ^= 1
    run.put(f"{manifest.key}/{piece.file}", bytes(data))
    with pytest.raises(CheckpointError, match=r"checksum of weight encoder.cls_token is wrong"):
        load_student(run)
