"""Verification: damage that is found, dropped and made again, and features that are not what the teacher gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from core.features.codec import FeatureError, decode, encode
from core.features.rows import Rows
from core.features.sets import file, key
from core.features.verify import LEAST_COSINE, _cosine, verify
from core.features.work import Chunk, Work
from core.methods.base import Batch, Features
from tests.core.features.toy_features import CPU, Pixels, begun, planned, work_off


@pytest.fixture
def work(root: str) -> Work:
    """All there, of two teachers and two views."""
    made = planned(root, views=2)
    work_off(made, root)
    for found in made.sets.values():
        for view in range(2):
            found.seal(view)
    return made


def verified(work: Work) -> tuple[list[str], list[str]]:
    said: list[str] = []
    return verify(work, dict.fromkeys(work.sets, Pixels()), CPU, said.append), said


def contents(work: Work) -> dict[str, bytes]:
    return {f"{name}/{e.key}": s.store.get(e.key) for name, s in work.sets.items() for e in s.store.list("view-")}


def test_sound_features_stay_as_they_are(work: Work) -> None:
    before = contents(work)
    wrong, said = verified(work)
    assert not wrong
    assert said[0] == "train: 12 of 12 parts are whole"
    assert "teacher one: rows computed again agree with a cosine of 1.000000 at least" in said[1]
    assert contents(work) == before


def test_damage_of_every_kind_is_dropped_and_made_again_as_it_was(work: Work, root: str) -> None:
    before, one, two = contents(work), work.sets["one"], work.sets["two"]
    parts = one.finished(0)
    short, turned, gone = (file(0, number, parts[number]) for number in (0, 1, 2))
    one.store.put(short, one.store.get(short)[:-1])
    one.store.put(turned, one.store.get(turned)[:-1] + b"\x07")
    one.store.delete(gone)
    one.store.put(f"{key(0, 3)}.json", b"{")
    two.store.put("view-1/index.json", b"[]")
    wrong, said = verified(work)
    assert [line.partition(":")[0] for line in wrong] == [
        *(f"teacher one, view 0, part {number}" for number in range(4)), "teacher two, view 1",
    ]  # fmt: skip
    assert all(line.endswith("; dropped") for line in wrong)
    assert said[0] == "train: 8 of 12 parts are whole"
    assert two.store.size("view-1/index.json"), "made anew: its parts are sound"
    assert one.store.size("view-0/index.json") is None
    work_off(work, root)
    one.seal(0)
    assert contents(work) == before
    assert not verified(work)[0]


def test_an_index_that_names_a_part_that_is_gone_is_dropped(work: Work) -> None:
    one = work.sets["one"]
    one.store.delete(f"{key(1, 2)}.json", file(1, 2, one.finished(1)[2]))
    assert verified(work)[0] == ["teacher one, view 1: index.json is damaged or not of these parts; dropped"]
    assert one.done(1) == {0, 1, 3, 4, 5}


def test_features_that_the_teacher_does_not_give_any_more_are_refused(work: Work) -> None:
    class Other(Pixels):
        def __call__(self, batch: Batch) -> Features:
            found = super().__call__(batch)
            return Features(found.cls, found.patch.flip(1))

    with pytest.raises(FeatureError, match=r"teacher one: .*/features/\w{16} have a cosine of .* remove that folder"):
        verify(work, {"one": Other()}, CPU, print)


def test_crops_of_other_images_are_refused(work: Work, tmp_path: Path) -> None:
    one = work.sets["one"]
    name = file(0, 0, one.finished(0)[0])
    one.store.get_file(name, tmp_path / "part")
    tensors = load_file(tmp_path / "part")
    save_file({**tensors, "box": tensors["box"] + 1}, tmp_path / "part")
    one.drop(0, 0)
    one.commit(0, 0, tmp_path / "part", [])
    with pytest.raises(FeatureError, match="crops are not those of the stored features; images have changed since"):
        verify(work, {"one": Pixels()}, CPU, print)


def test_what_is_half_there_is_verified_as_far_as_it_is(root: str) -> None:
    work = planned(root)
    work_off(work, root)
    for found in work.sets.values():
        for number in (1, 2, 5):
            found.drop(0, number)
    wrong, said = verified(work)
    assert not wrong
    assert said[0] == "train: 3 of 6 parts are whole"


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_eight_bits_are_no_damage(root: str, codec: str) -> None:
    work = planned(root, codec=codec)
    work_off(work, root)
    assert not verified(work)[0]


def test_what_eight_bits_lose_of_a_token_with_one_large_channel_is_no_damage(root: str, tmp_path: Path) -> None:
    cls_BD = torch.full((4, 768), 0.49 / 127)  # all of it rounds to nothing beside the large one
    cls_BD[:, 0] = 1.0
    assert F.cosine_similarity(cls_BD, decode("cls", encode("int8", "cls", cls_BD)), dim=-1).max() < LEAST_COSINE
    found = begun(root, {"rows": 4, "codec": "int8", "outputs": {"cls": [768]}, "teacher": {"model": "vit"}}, [4])
    save_file(encode("int8", "cls", cls_BD), tmp_path / "part")
    found.commit(0, 0, tmp_path / "part", [])
    chunk, teacher = Chunk(0, 0, range(4), Batch({}), [], None), lambda batch: Features(cls_BD, cls_BD)
    assert _cosine(chunk, Rows(found, 1, None), teacher, "int8") > LEAST_COSINE
