"""What a stage takes from the store: all of it, what is there of it, or nothing, and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from core.cache import ShardCache
from core.features.about import describe, fingerprint
from core.features.codec import FeatureError
from core.features.stored import Available, Beside, Stored, available
from core.features.work import Work
from core.inputs import Inputs, open_inputs
from core.methods.base import Batch, Features
from core.models.teachers import FrozenTeacher
from core.recipe import Recipe
from core.storage import open_store
from tests import toy
from tests.core.features.toy_features import CPU, Pixels, planned, recipe, values, work_off


def opened(wanted: Recipe, root: str) -> Inputs:
    return open_inputs(wanted, wanted.stage_names()[0], root, None)


def found(root: str, features: str, views: int = 1, codec: str = "fp32") -> Available:
    return available(opened(recipe(views, codec, features), root), root, None)


def half(root: str, codec: str = "fp32") -> Work:
    """Every other part of the only view is stored."""
    work = planned(root, codec=codec)
    work_off(work, root)
    for each in work.sets.values():
        for part in range(0, len(each.ends), 2):
            each.drop(0, part)
    return work


def test_features_off_looks_at_no_store(root: str) -> None:
    work_off(planned(root), root)
    assert not found(root, "off").rows["train"]


def test_what_is_required_and_not_there_is_refused_with_how_to_make_it(root: str) -> None:
    with pytest.raises(FeatureError, match=r"features of teacher one for data\.source are not stored: wanted are "
                       r"\w{16}: make features RECIPE=\.\.\. VIEWS=1"):  # fmt: skip
        found(root, "require")
    with pytest.raises(FeatureError, match=r"data\.views is 0: every epoch has crops of its own"):
        found(root, "require", views=0)


def test_other_features_are_refused_with_both_fingerprints_and_what_differs(root: str) -> None:
    stored = planned(root, codec="bf16").sets["one"]
    stored.begin()
    own = fingerprint(stored.about)[:16]
    wanted = fingerprint(describe(opened(recipe(), root), "train", root)["one"])[:16]
    words = f"wanted are {wanted}, there are {own}, which differ in codec: bf16 and fp32: make features"
    with pytest.raises(FeatureError, match=words):
        found(root, "require")
    assert words in found(root, "auto").notes[0]


def test_half_of_the_parts_are_refused_where_all_are_required_and_taken_where_not(root: str) -> None:
    half(root)
    with pytest.raises(FeatureError, match=r"features of teacher one for data\.source: 24 rows are not stored yet: "
                       r"make features RECIPE=\.\.\. VIEWS=1"):  # fmt: skip
        found(root, "require")
    some = found(root, "auto")
    assert sorted(some.rows["train"]) == ["one", "two"]
    assert [note.partition(":")[0] for note in some.notes] == [
        "features of teacher one for data.source", "features of teacher two for data.source"]  # fmt: skip


def test_only_teachers_that_are_needed_are_loaded(root: str) -> None:
    work = planned(root)
    work_off(work, root)
    asked: list[set[str]] = []

    def load(names: set[str]) -> dict[str, FrozenTeacher]:
        asked.append(set(names))
        return dict.fromkeys(names)  # type: ignore[arg-type]

    inputs = opened(recipe(features="auto"), root)
    available(inputs, root, None).teachers(inputs, load)
    work.sets["two"].drop(0, 3)
    available(inputs, root, None).teachers(inputs, load)
    assert asked == [set(), {"two"}]


def batch_of(work: Work, index: list[int]) -> Batch:
    """Images of these rows, as a rank has them."""
    images = torch.cat([chunk.batch.views["image"][: len(chunk.rows)] for chunk in work.chunks(work.items(), CPU)])
    return Batch({"image": images[index]}, torch.tensor(index), 0, training=True, labels=torch.zeros(len(index)))


def test_rows_that_are_missing_come_from_the_live_teacher_and_are_the_same(root: str) -> None:
    work = half(root)
    index = [3, 12, 20, 9, 45, 30]
    batch = batch_of(work, index)
    whole = Pixels()(batch)
    rows = found(root, "auto").rows["train"]["one"]
    batch.extra.update(Beside("one", rows, 1, "image")(0, 0, 0, np.array(index)))
    assert 0 < len(batch.extra["one/missing"]) < len(index)

    class View:
        view = "image"

        def __call__(self, some: Batch) -> Features:
            assert len(some.views["image"]) == len(batch.extra["one/missing"]), "only these are computed"
            return Pixels()(some)

    mixed = Stored("one", View())(batch)  # type: ignore[arg-type]
    assert torch.equal(mixed.cls, whole.cls)
    assert torch.equal(mixed.patch, whole.patch)
    with pytest.raises(FeatureError, match="teacher one: stored features lack rows"):
        Stored("one", None)(batch)


def test_a_store_in_a_bucket_is_read_through_the_node_s_cache(bucket: str, tmp_path: Path) -> None:
    local = toy.store(tmp_path, images=10)
    for entry in open_store(local).list("data/"):
        open_store(bucket).put(entry.key, open_store(local).get(entry.key))
    work = planned(bucket)
    work_off(work, bucket)
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    some = available(opened(recipe(features="require"), bucket), bucket, cache)
    stored, missing = some.rows["train"]["one"].read(0, np.arange(10))
    assert not len(missing)
    assert torch.equal(stored["patch"], values(work, "one")["patch"])
    assert len([path for path in cache.folder.iterdir() if path.is_file()]) == len(work.any_set.ends)
