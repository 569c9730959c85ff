"""Sets of stored features: how rows are divided, what counts as a part, and damage that is found."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.features import sets
from core.features.about import fingerprint
from core.features.codec import FeatureError
from core.features.sets import FeatureSet, division, file, key
from core.storage import Store, open_store
from tests.core.features.toy_features import begun

ENDS = [8, 16, 20]


def about(**changed: Any) -> dict[str, Any]:
    return {"rows": 20, "codec": "fp32", "outputs": {"cls": [4]}, "images": {"view": {}}, "data": "d",
            "teacher": {"model": "vit", "weights": "w"}, **changed}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


@pytest.fixture
def found(root: str) -> FeatureSet:
    return begun(root, about(), ENDS)


def written(folder: Path, fill: float = 1.0, rows: int = 8) -> Path:
    path = folder / "part.safetensors"
    save_file({"cls": torch.full((rows, 4), fill), "box": torch.zeros(rows, 5, dtype=torch.int32)}, path)
    return path


def whole(found: FeatureSet, folder: Path) -> FeatureSet:
    for part in range(len(ENDS)):
        found.commit(0, part, written(folder, part, len(found.rows(part))), [])
    return found


def edit(store: Store, name: str, **changed: Any) -> None:
    store.put(name, json.dumps({**json.loads(store.get(name)), **changed}).encode())


@pytest.mark.parametrize(
    ("shards", "repeats", "ends"),
    [
        ([30], 1, [7, 15, 22, 30]),  # large shards are cut evenly
        ([3, 3, 3, 3], 1, [9, 12]),  # small ones are put together
        ([3, 40, 1], 1, [8, 17, 25, 34, 43, 44]),
        ([3], 1, [3]),
        ([8], 3, [8, 16, 24]),
        ([5], 3, [10, 15]),
    ],
)
def test_parts_have_about_as_many_rows_and_cover_all(shards: list[int], repeats: int, ends: list[int]) -> None:
    assert division(np.array(shards, np.int64), repeats, 8) == ends


def test_a_part_has_whole_shards_or_lies_within_one_except_for_small_ones_before_it() -> None:
    shards = np.random.default_rng(0).integers(1, 60, 200)
    ends = np.array([0, *division(shards, 1, 16)])
    assert ends[-1] == shards.sum()
    assert np.diff(ends).min() >= 1
    assert np.diff(ends).max() < 60 + 16
    assert np.isin(ends, np.cumsum([0, *shards])).sum() > 100


def test_of_two_workers_with_the_same_part_the_first_counts(store_uri: str, tmp_path: Path) -> None:
    found = begun(store_uri, about(), ENDS)
    assert found.commit(0, 1, written(tmp_path, 1.0), [])
    first = found.finished(0)[1]
    assert not found.commit(0, 1, written(tmp_path, 2.0), [3]), "rounded in another way, on another device"
    assert found.finished(0) == {1: first}
    assert not found.commit(0, 1, written(tmp_path, 1.0), []), "the same bytes"
    assert [entry.key for entry in found.store.list("view-0/")] == [file(0, 1, first), f"{key(0, 1)}.json"]


def test_a_view_is_sealed_once_all_its_parts_are_there(found: FeatureSet, tmp_path: Path) -> None:
    found.commit(0, 0, written(tmp_path), [])
    assert not found.seal(0)
    whole(found, tmp_path)
    before = found.finished(0)
    assert found.seal(0)
    assert found.seal(0)
    assert found.finished(0) == before
    assert json.loads(found.store.get("view-0/index.json"))["2"]["rows"] == 4


def test_the_division_is_that_of_whoever_comes_first(found: FeatureSet, root: str) -> None:
    late = FeatureSet(found.store, about(), [20])  # planned before the other one began
    assert begun(root, about(), [20]).ends == ENDS
    with pytest.raises(FeatureError, match="another worker has begun other parts; start this one again"):
        late.begin()


def test_what_is_only_planned_leaves_nothing(root: str) -> None:
    assert sets.planned(root, about(), ENDS).done(0) == set()
    assert sets.find(root, about()) is None
    assert sets.nearest(root, about()) is None


def test_a_set_that_is_added_to_counts_as_new(found: FeatureSet, root: str, tmp_path: Path) -> None:
    whole(found, tmp_path)
    path = Path(found.store.uri.removeprefix("file://")) / "about.json"
    os.utime(path, (0, 0))
    sets.planned(root, about(), ENDS)
    assert path.stat().st_mtime == 0
    begun(root, about(), ENDS)
    assert path.stat().st_mtime > 0


def test_a_part_that_is_dropped_counts_no_longer(found: FeatureSet, tmp_path: Path) -> None:
    whole(found, tmp_path).seal(0)
    found.drop(0, 1)
    assert found.done(0) == {0, 2}
    assert sorted(found.finished(0)) == [0, 2]
    assert not list(found.store.list(key(0, 1)))


def test_a_file_cut_short_is_named_with_both_sizes(found: FeatureSet, tmp_path: Path) -> None:
    name = file(0, 1, whole(found, tmp_path).finished(0)[1])
    data = found.store.get(name)
    found.store.put(name, data[:-10])
    with pytest.raises(FeatureError, match=rf"{name} has {len(data) - 10} bytes, not {len(data)}: .*VERIFY=1"):
        found.finished(0)
    found.store.delete(name)
    with pytest.raises(FeatureError, match=rf"{name} has no bytes, not {len(data)}"):
        found.finished(0)


@pytest.mark.parametrize(
    "changed", [{"rows": 7}, {"extra": 1}, {"bad": None}, {"bytes": "8"}, {"crc32c": None}, {"bad": ["3"]}]
)
def test_an_edited_part_does_not_fit_the_set(found: FeatureSet, tmp_path: Path, changed: dict[str, Any]) -> None:
    edit(whole(found, tmp_path).store, f"{key(0, 1)}.json", **changed)
    with pytest.raises(FeatureError, match=r"part-000001\.json does not fit the set: .*VERIFY=1"):
        found.finished(0)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]", b'{"x": {}}', b'{"0": 3}', b'{"9": {}}'])
def test_a_damaged_index_is_named_and_dropped(found: FeatureSet, tmp_path: Path, content: bytes) -> None:
    parts = whole(found, tmp_path).finished(0)
    found.store.put("view-0/index.json", content)
    with pytest.raises(FeatureError, match=r"view-0/.*VERIFY=1"):
        found.finished(0)
    assert found.drop_wrong_index(0)
    assert found.finished(0) == parts


def test_an_index_of_other_parts_is_dropped_and_a_sound_one_stays(found: FeatureSet, tmp_path: Path) -> None:
    assert not found.drop_wrong_index(0), "there is none"
    whole(found, tmp_path).seal(0)
    assert not found.drop_wrong_index(0)
    edit(found.store, "view-0/index.json", **{"1": json.loads(found.store.get(f"{key(0, 0)}.json"))})
    assert found.drop_wrong_index(0)
    assert found.store.size("view-0/index.json") is None


def test_a_missing_index_is_read_from_the_parts(found: FeatureSet, tmp_path: Path) -> None:
    whole(found, tmp_path).seal(0)
    before = found.finished(0)
    found.store.delete("view-0/index.json")
    assert found.finished(0) == before


def test_a_set_of_the_same_place_and_another_fingerprint_is_refused_with_both(root: str) -> None:
    wanted, other = about(), about(data="other")
    place = open_store(root).sub(f"features/{fingerprint(wanted)[:16]}")
    place.put("about.json", json.dumps({"fingerprint": fingerprint(other), "about": other, "ends": ENDS}).encode())
    with pytest.raises(FeatureError) as refused:
        sets.find(root, wanted)
    assert fingerprint(wanted) in str(refused.value)
    assert fingerprint(other) in str(refused.value)


def test_what_a_set_is_of_cannot_be_edited(found: FeatureSet, root: str) -> None:
    edit(found.store, "about.json", about=about(codec="int8"))
    with pytest.raises(FeatureError, match=f"wanted are features {fingerprint(about())}, these are "):
        sets.find(root, about())


@pytest.mark.parametrize("ends", [[], [8, 16], [16, 8, 20], [8, 8, 20], ["a"], 20, None])
def test_a_division_that_does_not_fit_the_rows_is_refused(found: FeatureSet, root: str, ends: Any) -> None:
    edit(found.store, "about.json", ends=ends)
    with pytest.raises(FeatureError, match=r"about\.json is damaged; remove that folder"):
        sets.find(root, about())


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}"])
def test_a_damaged_set_is_named_to_who_wants_it_and_passed_over_by_others(root: str, content: bytes) -> None:
    begun(root, about(codec="bf16"), ENDS)
    broken = begun(root, about(codec="int8"), ENDS)
    broken.store.put("about.json", content)
    with pytest.raises(FeatureError, match="is damaged"):
        sets.find(root, about(codec="int8"))
    near = sets.nearest(root, about())
    assert near == (fingerprint(about(codec="bf16")), ["codec: bf16 and fp32"])


def test_the_nearest_set_is_of_the_same_model_and_differs_least(root: str) -> None:
    assert sets.nearest(root, about()) is None
    begun(root, about(teacher={"model": "resnet", "weights": "w"}), ENDS)
    assert sets.nearest(root, about()) is None
    begun(root, about(codec="int8", data="other"), ENDS)
    begun(root, about(data="other"), ENDS)
    assert sets.nearest(root, about()) == (fingerprint(about(data="other")), ["data: other and d"])
