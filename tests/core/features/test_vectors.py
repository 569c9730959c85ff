"""Vectors of whole images and of sentences: made by a CLIP once, then read in its place."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from core.config import ConfigError, from_yaml, to_yaml
from core.data.decode import to_tensor
from core.data.draws import uniform
from core.data.pillow import eval_pil
from core.data.sentences import candidates
from core.data.source import DataError
from core.data.tsv import write_index
from core.features import run as features
from core.features.clip import clip_of
from core.features.codec import FeatureError
from core.features.source import StoreFeatures
from core.features.vectors import TEXT_DRAWS
from core.features.work import Work
from core.inputs import open_inputs
from core.methods.base import Batch, Outputs
from core.models.text import TextTower
from core.models.weights import WeightsError
from core.recipe import Recipe
from core.registry import complete
from core.storage import open_store
from core.train import train
from tests import toy
from tests.ranks import run_ranks

SENTENCES, STEPS, DIM, SIDE = 13, 8, 12, 16
RECIPE = """
name: toy-dime
method: {name: dime_fm, options: {resize: 0}}
student:
  name: vit_base_patch32_clip_quickgelu_224
  args: &tiny {patch_size: 8, embed_dim: 64, depth: 1, num_heads: 1, num_classes: 12}
teachers:
  clip:
    {name: vit_base_patch32_clip_quickgelu_224, args: {img_size: 16, <<: *tiny}, weights: random, cls: projected,
     normalize: own}
data: {source: "store:data", heldout: "store:data", texts: "store:texts", codec: fp32, block: 16}
train: {img_size: 8, steps: 8, batch: 8, micro_batch: 4, lr: 0.001, lr_batch: 0, warmup_steps: 1, precision: fp32}
launch: {device: cpu}
loader: {workers: 0}
checkpoint: {every_steps: 100}
log: {every_steps: 1, tensorboard: false}
"""


def recipe(mode: str = "off", **data: object) -> Recipe:
    found = from_yaml(RECIPE)
    found.features = mode
    for key, value in data.items():
        setattr(found.data, key, value)
    return complete(from_yaml(to_yaml(found)))


def payload(number: int) -> str:
    return json.dumps({"captions": [f"picture {number}", f"photo {number}", f"scan {number}"]})


@pytest.fixture
def root(tmp_path: Path) -> str:
    """A store with images in shards and tables of sentences, of which the fourth row has none."""
    found = toy.store(tmp_path)
    rows = [f"k{i}\t{'null' if i == 3 else payload(i)}\n" for i in range(SENTENCES)]
    write_table(found, "texts/text_0.tsv", rows)
    return found


def write_table(root: str, key: str, rows: list[str]) -> None:
    open_store(root).put(key, "".join(rows).encode())
    write_index(open_store(root), key)


def fill(wanted: Recipe, root: str) -> dict[str, Work]:
    works = features.works(wanted, root, ("train", "heldout", "texts"))
    for work in works:
        features.store(work, root, torch.device("cpu"), print)
    return {work.split: work for work in works}


def vectors(root: str, split: str) -> StoreFeatures:
    found = open_inputs(recipe("require"), "main", root).stored.vectors[split]  # type: ignore[index]
    assert isinstance(found, StoreFeatures)
    return found


def read(root: str, split: str) -> NDArray[np.float32]:
    found = vectors(root, split)
    return np.asarray(found.read(np.arange(len(found)))["clip"])


def unfolded(root: str) -> Outputs:
    """The image tower with the same random weights, for pixels that are normalised as CLIP's own."""
    clip = recipe().teachers["clip"]
    alone = replace(recipe(), teachers={"clip": replace(clip, normalize="student")})
    return clip_of(alone.teachers).image_tower(alone, root, torch.device("cpu"), torch.float32)


def test_images_are_whole_as_clip_is_evaluated_and_sentences_are_drawn_by_row(root: str) -> None:
    done = fill(recipe(), root)
    assert {split: work.any_set.about["rows"] for split, work in done.items()} == {
        "train": 48, "heldout": 48, "texts": SENTENCES,
    }  # fmt: skip
    source = open_inputs(recipe("require"), "main", root).source
    images = [eval_pil(to_tensor(source.read(i).data), SIDE, SIDE, norm="clip") for i in range(4)]
    want = unfolded(root)(Batch({"image": torch.stack(images)})).cls
    torch.testing.assert_close(torch.from_numpy(read(root, "train")[:4]), want, atol=1e-4, rtol=1e-4)

    rows = [i for i in range(SENTENCES) if i != 3]
    draws = [int(uniform(TEXT_DRAWS, 0, np.array([i]), 0, 1)[0, 0] * 3) for i in rows]
    assert len(set(draws)) > 1
    meant = [candidates(payload(i))[draw] for i, draw in zip(rows, draws, strict=True)]
    text: Any = clip_of(recipe().teachers).text_tower(root, torch.device("cpu"))
    torch.testing.assert_close(torch.from_numpy(read(root, "texts")), text.tower.encode(meant), atol=1e-5, rtol=1e-4)


def losses(wanted: Recipe, root: str, name: str) -> list[float]:
    rows: list[dict[str, Any]] = []
    train(wanted, open_store(f"{root}/runs/{name}"), root, 1, rows.append, lambda: False)
    return [row["loss"] for row in rows if "loss" in row]


def test_a_run_from_stored_vectors_is_the_run_from_tables_with_the_same_vectors(root: str) -> None:
    fill(recipe(), root)
    for split, role in (("train", "image"), ("texts", "text")):
        encoded = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in read(root, split)]
        write_table(root, f"tables/{role}_0.feat.tsv", [f"k{i}\t{text}\n" for i, text in enumerate(encoded)])
    tables = recipe(features="store:tables", texts="store:tables", heldout="")
    stored = recipe("require", heldout="")
    of_tables = run_ranks(losses, 1, tables, root, "tables")[0]
    of_store = run_ranks(losses, 1, stored, root, "stored")[0]
    assert len(of_store) == STEPS
    assert of_store == of_tables


def test_training_loads_no_teacher_and_copies_of_an_image_share_its_vector(root: str) -> None:
    fill(recipe(repeats=2), root)
    inputs = open_inputs(recipe("require", repeats=2), "main", root)
    assert (inputs.teachers, sorted(inputs.stored.vectors)) == ({}, ["heldout", "texts", "train"])
    images, texts = inputs.companions[1], inputs.companions[0]
    found = images(0, 0, 0, np.array([5, 53]))["image_features"]
    assert torch.equal(found[0], found[1])
    assert len(inputs.held_companions) == 2
    assert texts(0, 0, 0, np.arange(4))["text_features"].shape == (4, DIM)


def test_an_image_that_cannot_be_read_has_no_vector(root: str) -> None:
    store, source = open_store(root), open_inputs(recipe(), "main", root, beside=False).source
    for i in range(9):
        data = source.read(i).data
        assert isinstance(data, bytes)
        store.put(f"folder/{i}.png", data[:60] if i == 4 else data)
    own: dict[str, object] = {"source": "store:folder", "heldout": ""}
    fill(recipe(**own), root)
    found = open_inputs(recipe("require", **own), "main", root).stored.vectors["train"]
    rows = np.array([0, 8, 5, 3])
    images = [eval_pil(to_tensor(source.read(i).data), SIDE, SIDE, norm="clip") for i in rows.tolist()]
    want = unfolded(root)(Batch({"image": torch.stack(images)})).cls.numpy()
    np.testing.assert_allclose(found.read(rows)["clip"], want, atol=1e-4, rtol=1e-4)
    with pytest.raises(FeatureError, match="no vector is stored for row 4, whose image could not be read"):
        found.read(np.array([3, 4]))


def test_other_vectors_than_the_stored_ones_are_refused_with_both_fingerprints(root: str) -> None:
    made = fill(recipe(), root)
    with pytest.raises(
        FeatureError, match=r"data\.source are not stored: wanted are [0-9a-f]{16}, there are "
    ) as error:
        open_inputs(recipe("require", codec="bf16"), "main", root)
    assert str(made["train"].any_set)[-16:] in str(error.value)
    assert "codec: fp32 and bf16" in str(error.value)
    write_table(root, "texts/text_0.tsv", [f"k{i}\t{payload(i)}\n" for i in range(SENTENCES)])
    with pytest.raises(FeatureError, match=r"data\.texts are not stored: .* SPLIT=texts CODEC="):
        open_inputs(recipe("require"), "main", root)


def test_auto_reads_tables_of_what_is_not_stored(root: str) -> None:
    with pytest.raises(DataError, match=r"no tables of role text_feat.* or make features"):
        open_inputs(recipe("auto"), "main", root)
    write_table(root, "texts/text_0.feat.tsv", [f"k\t{base64.b64encode(bytes(4 * DIM)).decode()}\n"] * 20)
    for work in features.works(recipe(), root, ("train", "heldout")):
        features.store(work, root, torch.device("cpu"), print)
    inputs = open_inputs(recipe("auto"), "main", root)
    assert sorted(inputs.stored.vectors) == ["heldout", "train"]
    assert "data.texts are not stored" in inputs.stored.notes[0]


def test_what_is_stored_is_verified_and_mended(root: str) -> None:
    work = fill(recipe(), root)["texts"]
    said: list[str] = []
    assert features.check(work, root, torch.device("cpu"), said.append) == []
    assert any("cosine of 1.0000" in line or "cosine of 0.9999" in line for line in said)
    (path,) = (Path(str(work.any_set).removeprefix("file://")) / "view-0").glob("part-000000-*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "dropped" in features.check(work, root, torch.device("cpu"), print)[0]
    assert work.done() == set()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"cls": "token"}, "use teachers.clip.cls=projected"), ({"text": "store:none.pt"}, "none.pt does not give")],
)
def test_a_teacher_without_vectors_of_sentences_is_refused(root: str, change: dict[str, str], message: str) -> None:
    wanted = recipe()
    wanted.teachers["clip"] = replace(wanted.teachers["clip"], **change)  # type: ignore[arg-type]
    with pytest.raises((ConfigError, WeightsError), match=message):
        features.works(wanted, root, ("texts",))


def test_sentences_come_from_the_text_tower_of_a_checkpoint(root: str, tmp_path: Path) -> None:
    tower = TextTower(width=64, layers=1, heads=1, dim=DIM, slots=77)
    torch.save(tower.model.state_dict(), tmp_path / "clip.pt")
    wanted = recipe()
    wanted.teachers["clip"] = replace(wanted.teachers["clip"], text="store:clip.pt")
    clip = clip_of(wanted.teachers)
    found: Any = clip.text_tower(root, torch.device("cpu"))
    assert torch.equal(found.tower.encode(["a cat"]), tower.eval().encode(["a cat"]))
    assert clip.about_texts(root)["weights"] != "random for clip"
    with pytest.raises(ConfigError, match="recipe has 0"):
        clip_of({})
