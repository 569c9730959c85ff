from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from core.data.features import (
    IMAGE,
    TEXT,
    Beside,
    FeatureSource,
    FixedTexts,
    TextStream,
    check_width,
    open_features,
)
from core.data.source import ArraySource, DataError
from core.data.subset import composed_by
from core.data.tsv import write_index
from core.folder import FileStore
from core.recipe import Data


class Numbers(FeatureSource):
    """Row i is [i]."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def describe(self) -> dict[str, tuple[int, ...]]:
        return {"one": (1,)}

    def read(self, index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {"one": index[:, None].astype(np.float32)}


def write(folder: Path, name: str, rows: NDArray[np.float32]) -> None:
    store = FileStore(folder)
    payloads = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
    store.put(f"{name}.feat.tsv", "".join(f"k{i}\t{p}\n" for i, p in enumerate(payloads)).encode())
    write_index(store, f"{name}.feat.tsv")


def epoch(stream: TextStream, number: int, micros: int, steps: int) -> list[list[int]]:
    """Rows of every global batch of an epoch."""
    return [[int(i) for m in range(micros) for i in stream.rows(number, m, step)] for step in range(steps)]


def test_sentences_are_used_once_in_a_pass_and_start_anew_when_they_are_used_up() -> None:
    stream = TextStream(Numbers(13), seed=1, micros=2, micro_batch=3, epoch_steps=5)
    batches = epoch(stream, 0, 2, 5)
    assert stream.batches == 2
    for first in (0, 2):
        used = batches[first] + batches[first + 1]
        assert len(set(used)) == len(used) == 12
    assert batches[0] != batches[2] != batches[4]
    assert batches[:2] != epoch(stream, 1, 2, 2)


def test_a_larger_set_gives_another_prefix_in_every_epoch() -> None:
    stream = TextStream(Numbers(1000), seed=1, micros=1, micro_batch=8, epoch_steps=2)
    first, second = ({i for batch in epoch(stream, e, 1, 2) for i in batch} for e in (0, 1))
    assert len(first) == len(second) == 16
    assert max(first | second) > 500
    assert len(first & second) < 8


def test_rows_depend_on_seed_and_place_alone() -> None:
    make = [TextStream(Numbers(50), seed, micros=2, micro_batch=4, epoch_steps=20) for seed in (3, 3, 4)]
    later = pickle.loads(pickle.dumps(make[1])).rows(2, 1, 17)
    epoch(make[0], 0, 2, 20)  # what was read before changes nothing
    assert make[0].rows(2, 1, 17).tolist() == later.tolist()
    assert later.tolist() != make[2].rows(2, 1, 17).tolist()


def test_the_stream_gives_as_many_vectors_as_images() -> None:
    stream = TextStream(Numbers(50), 3, micros=1, micro_batch=4, epoch_steps=5)
    found = stream(1, 0, 2, np.arange(4))
    assert found[TEXT][:, 0].tolist() == stream.rows(1, 0, 2).tolist()
    assert FixedTexts(Numbers(5))(0, 0, 0, np.array([4, 5, 11]))[TEXT][:, 0].tolist() == [4, 0, 1]


def test_too_few_sentences_are_refused() -> None:
    with pytest.raises(DataError, match="7 sentences do not fill one batch of 8"):
        TextStream(Numbers(7), 0, micros=2, micro_batch=4, epoch_steps=1)


def test_vectors_of_tables_come_by_row(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    write(tmp_path, "image_0", rows[:2])
    write(tmp_path, "image_1", rows[2:])
    features = open_features(f"file://{tmp_path}", "image_feat")
    assert features.describe() == {"teacher": (3,)}
    np.testing.assert_array_equal(features.read(np.array([4, 0]))["teacher"], rows[[4, 0]])
    check_width(features, 3)
    with pytest.raises(DataError, match=r"student's \(4,\): set student\.args\.num_classes"):
        check_width(features, 4)


def test_rows_of_another_width_are_refused_when_read(tmp_path: Path) -> None:
    write(tmp_path, "image_0", np.zeros((1, 3), np.float32))
    write(tmp_path, "image_1", np.zeros((1, 2), np.float32))
    with pytest.raises(DataError, match="row 1 has 2 numbers, row 0 has 3"):
        open_features(f"file://{tmp_path}", "image_feat").read(np.arange(2))


def test_vectors_must_be_as_many_as_images(tmp_path: Path) -> None:
    write(tmp_path, "image_0", np.zeros((3, 2), np.float32))
    folder, images = f"file://{tmp_path}", ArraySource(np.zeros((4, 8, 8), np.uint8))
    beside = Beside(images, folder, folder, 0, 1, 2, 2)
    with pytest.raises(DataError, match="3 vectors for 4 images"):
        beside.image_vectors()
    with pytest.raises(DataError, match="no tables of role text_feat"):
        beside.text_vectors()
    paired = Beside(ArraySource(np.zeros((3, 8, 8), np.uint8)), folder, folder, 0, 1, 2, 1)
    assert paired.image_vectors()(0, 0, 0, np.array([2, 1]))[IMAGE].shape == (2, 2)


@pytest.mark.parametrize("change", [{"merge": ["store:more"]}, {"classes": 0.5}, {"samples": 9}, {"repeats": 3}])
def test_images_that_are_not_the_rows_of_their_source_cannot_have_stored_vectors(change: dict[str, Any]) -> None:
    composed = composed_by(Data(**change))
    beside = Beside(ArraySource(np.zeros((3, 8, 8), np.uint8)), "", "", 0, 1, 2, 1, composed)
    with pytest.raises(DataError, match=rf"^data\.{next(iter(change))}: stored vectors"):
        beside.image_vectors()
    assert composed_by(Data(source="x", block=1)) == ""
