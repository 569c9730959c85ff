"""Rows of stored features, from a folder, by ranged gets and through the node's cache."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from core.cache import ShardCache
from core.features.codec import FeatureError
from core.features.rows import Rows
from core.features.sets import FeatureSet, file
from tests.core.features.toy_features import begun

ENDS = [8, 16, 20]
ABOUT = {"rows": 20, "codec": "fp8", "outputs": {"cls": [4], "patch": [3, 4]}, "images": {"view": {}}, "data": "d",
         "teacher": {"model": "vit"}}  # fmt: skip


def filled(root: str, folder: Path) -> FeatureSet:
    """Two of three parts of one view: each number is the row's, part 1 has an unreadable image in its row 2."""
    made = begun(root, ABOUT, ENDS)
    for part, bad in ((0, []), (1, [2])):
        number = torch.tensor(made.rows(part)).float()
        save_file(
            {"cls": number.view(-1, 1).expand(-1, 4).to(torch.float8_e4m3fn).contiguous(), "cls.scale": number,
             "patch": torch.ones(8, 3, 4).to(torch.float8_e4m3fn), "patch.scale": number.view(-1, 1).expand(-1, 3)
             .contiguous(), "box": number.view(-1, 1).expand(-1, 5).int().contiguous()},
            folder / "part",
        )  # fmt: skip
        made.commit(0, part, folder / "part", bad)
    return made


@pytest.fixture
def found(tmp_path: Path) -> FeatureSet:
    return filled(f"file://{tmp_path}/store", tmp_path)


@pytest.fixture(params=["without a cache", "with a cache"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> ShardCache | None:
    return ShardCache(tmp_path / "cache", 1 << 20) if request.param == "with a cache" else None


def test_rows_come_in_the_order_in_which_they_are_wanted(
    store_uri: str, tmp_path: Path, cache: ShardCache | None
) -> None:
    rows = Rows(filled(store_uri, tmp_path), 1, cache)
    index = np.array([15, 0, 7, 8, 1, 1, 14, 6])
    stored, missing = rows.read(0, index)
    assert not len(missing)
    assert stored["cls.scale"].tolist() == index.tolist()
    assert stored["patch.scale"][:, 2].tolist() == index.tolist()
    assert stored["box"][:, 4].tolist() == index.tolist()
    assert (stored["cls"].float()[:, 0] == stored["cls.scale"]).all()
    assert stored["patch"].dtype == torch.float8_e4m3fn


def test_rows_that_are_not_there_are_told_and_left_zero(found: FeatureSet) -> None:
    rows = Rows(found, 1, None)
    assert rows.lacking() == 4, "an unreadable image lacks nothing that could be made"
    stored, missing = rows.read(0, np.array([19, 9, 10, 16, 3]))
    assert missing.tolist() == [0, 2, 3]
    assert stored["cls.scale"].tolist() == [0, 9, 0, 0, 3]


def test_nothing_is_read_for_no_rows(found: FeatureSet) -> None:
    stored, missing = Rows(found, 1, None).read(0, np.zeros(0, np.int64))
    assert stored["patch"].shape == (0, 3, 4)
    assert missing.tolist() == []


def test_rows_survive_a_pickle(found: FeatureSet, cache: ShardCache | None) -> None:
    rows = pickle.loads(pickle.dumps(Rows(found, 1, cache)))
    assert rows.read(0, np.array([5]))[0]["cls.scale"].tolist() == [5]


def test_a_bucket_s_parts_come_through_the_node_s_cache_once(bucket: str, tmp_path: Path) -> None:
    made = begun(bucket, {**ABOUT, "codec": "fp32", "outputs": {"cls": [4]}, "images": {}}, ENDS)
    save_file({"cls": torch.arange(32.0).view(8, 4)}, tmp_path / "part")
    made.commit(0, 0, tmp_path / "part", [])
    cache = ShardCache(tmp_path / "cache", 1 << 20)
    one, other = Rows(made, 1, cache), Rows(made, 1, cache)
    assert one.read(0, np.array([3]))[0]["cls"].tolist() == [[12.0, 13.0, 14.0, 15.0]]
    made.store.delete(file(0, 0, made.finished(0)[0]))
    assert other.read(0, np.array([4]))[0]["cls"].tolist() == [[16.0, 17.0, 18.0, 19.0]]


def test_bytes_that_have_changed_are_not_taken_into_the_cache(bucket: str, tmp_path: Path) -> None:
    made = begun(bucket, {**ABOUT, "codec": "fp32", "outputs": {"cls": [4]}, "images": {}}, ENDS)
    save_file({"cls": torch.arange(32.0).view(8, 4)}, tmp_path / "part")
    made.commit(0, 0, tmp_path / "part", [])
    name = file(0, 0, made.finished(0)[0])
    data = made.store.get(name)
    made.store.put(name, data[:-1] + b"\xff")
    with pytest.raises(Exception, match=f"{name} is corrupt"):
        Rows(made, 1, ShardCache(tmp_path / "cache", 1 << 20)).read(0, np.array([3]))


def test_a_file_of_other_tensors_is_refused(found: FeatureSet) -> None:
    other = begun(found.store.uri + "/x", {**ABOUT, "outputs": {"cls": [5]}}, ENDS)
    for entry in list(found.store.list("view-0/")):
        other.store.put(entry.key, found.store.get(entry.key))
    with pytest.raises(FeatureError, match=r"part-000000-\w{8}\.safetensors: cls is F8_E4M3 \[8, 4\]: .*VERIFY=1"):
        Rows(other, 1, None).read(0, np.array([0]))


def test_a_file_that_shrinks_while_it_is_in_use_is_named(found: FeatureSet) -> None:
    rows = Rows(found, 1, None)
    name = file(0, 0, found.finished(0)[0])
    found.store.put(name, found.store.get(name)[:-200])
    with pytest.raises(FeatureError, match=rf"{name} ends early: .*VERIFY=1"):
        rows.read(0, np.array([7]))
