from __future__ import annotations

import numpy as np
import pytest

from core.data.repeated import RepeatedOrder
from core.data.source import ArraySource, DataError
from core.data.subset import Merged, compose
from core.recipe import Data


def source(labels: list[int], first: int = 0) -> ArraySource:
    images = (
        np.full((len(labels), 2, 2), 0, np.uint8) + np.arange(first, first + len(labels), dtype=np.uint8)[:, None, None]
    )
    return ArraySource(images, labels, ["a", "b", "c", "d", "e"])


LABELS = [i % 5 for i in range(50)]


def pixels(of: object) -> list[int]:
    return [int(of.read(i).data[0, 0]) for i in range(len(of))]  # type: ignore[attr-defined,arg-type]


def test_a_share_of_the_classes_keeps_all_their_images() -> None:
    cut = compose([source(LABELS)], Data(classes=0.4), seed=1)
    kept = {cut.label(i) for i in range(len(cut))}
    assert len(kept) == 2
    assert pixels(cut) == [i for i in range(50) if LABELS[i] in kept]
    assert pixels(cut) == pixels(compose([source(LABELS)], Data(classes=0.4), seed=1))
    assert len({tuple(pixels(compose([source(LABELS)], Data(classes=0.4), seed=s))) for s in range(8)}) > 1


def test_a_share_of_the_images_is_the_same_in_every_class() -> None:
    cut = compose([source(LABELS)], Data(share=0.3), seed=1)
    assert np.bincount([cut.label(i) for i in range(len(cut))]).tolist() == [3] * 5
    assert pixels(cut) == sorted(pixels(cut))
    assert int(cut.shard_sizes.sum()) == 15


def test_a_share_needs_labels() -> None:
    with pytest.raises(DataError, match=r"data.share: .* needs labels"):
        compose([ArraySource(np.zeros((4, 2, 2), np.uint8))], Data(share=0.5), seed=0)


def test_sources_come_one_after_the_other() -> None:
    both = compose([source([0, 1]), source([2, 3, 4], 10)], Data(), seed=0)
    assert pixels(both) == [0, 1, 10, 11, 12]
    assert [both.label(i) for i in range(5)] == [0, 1, 2, 3, 4]


def test_labels_of_different_classes_are_dropped() -> None:
    other = source([0, 1], 10)
    other.classes = ["x", "y"]
    both = Merged([source([0, 1]), other])
    assert both.classes == []
    assert [both.label(i) for i in range(4)] == [-1] * 4
    assert both.read(3).label == -1


def test_one_image_becomes_as_many_samples_as_asked_for() -> None:
    many = compose([source([0, 1, 2])], Data(samples=8), seed=0)
    assert pixels(many) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert int(many.shard_sizes.sum()) == 8


def test_copies_of_an_image_are_in_different_streams_and_have_different_indices() -> None:
    order = RepeatedOrder(np.ones(40, np.int64), seed=3, streams=4, block=8, repeats=3)
    index = np.stack([order.index(0, stream, np.arange(10)) for stream in range(4)])  # all 40 samples of an epoch
    assert len(np.unique(index)) == 40, "copies differ, so that their crops do"
    images, copies = index % 40, index // 40
    assert np.bincount(images.flatten(), minlength=40).max() == 3
    assert len(np.unique(images)) == 14  # ceil(40 / 3)
    assert sorted(np.unique(copies)) == [0, 1, 2]
    for image in np.unique(images):
        streams, positions = np.nonzero(images == image)
        assert len(set(streams)) == len(streams)
        assert np.ptp(positions) <= 1, "at the same time"
