"""Data sets that number the same classes differently."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from core.data.classes import numbered_as
from core.data.source import ArraySource, DataError
from core.data.subset import Merged

NAMES = ("test", "train")


def source(classes: list[str], labels: list[int]) -> ArraySource:
    return ArraySource(np.zeros((len(labels), 2, 2), np.uint8), labels, classes)


def labels(found: object) -> list[int]:
    return [found.label(i) for i in range(len(found))]  # type: ignore[attr-defined, arg-type]


def test_the_same_classes_in_another_order_are_matched_by_name() -> None:
    hub = source(["zebra", "apple", "mango"], [0, 1, 2, -1])
    found = pickle.loads(pickle.dumps(numbered_as(hub, ["apple", "mango", "zebra"], NAMES)))
    assert (labels(found), found.classes) == ([2, 0, 1, -1], ["apple", "mango", "zebra"])
    assert [found.read(i).label for i in range(4)] == labels(found)
    assert found.fingerprint() != hub.fingerprint()
    assert numbered_as(hub, hub.classes, NAMES) is hub


def test_numbers_are_names_so_that_folders_of_twelve_classes_fit_tars_of_twelve() -> None:
    numbers = [str(i) for i in range(12)]
    assert labels(numbered_as(source(sorted(numbers), [2, 11]), numbers, NAMES)) == [10, 9]


def test_other_classes_are_refused_with_examples_of_either_side() -> None:
    with pytest.raises(DataError, match="test lacks 8 of the 12, for example '0', '2', '4'. Classes are"):
        numbered_as(source(["1", "10", "3", "7"], [0]), [str(i) for i in range(12)], NAMES)
    with pytest.raises(DataError, match="train lacks 1 of the 2 of test, for example 'c'"):
        numbered_as(source(["a", "c"], [0]), ["a", "b"], NAMES)
    with pytest.raises(DataError, match="the classes of train are bare numbers"):
        numbered_as(source(["cat", "dog"], [0]), ["0", "1"], NAMES)
    with pytest.raises(DataError, match="some names come twice"):
        numbered_as(source(["a", "b", "a"], [0]), ["b", "a", "a"], NAMES)


def test_a_part_of_the_classes_is_enough_where_asked() -> None:
    assert labels(numbered_as(source(["c", "a"], [0, 1]), ["a", "b", "c"], NAMES, part=True)) == [2, 0]


def test_merged_sources_keep_labels_of_the_same_classes_in_any_order() -> None:
    merged = Merged([source(["a", "b"], [0, 1]), source(["b", "a"], [0, 1])])
    assert (merged.classes, labels(merged)) == (["a", "b"], [0, 1, 1, 0])
    assert [merged.read(i).label for i in range(4)] == [0, 1, 1, 0]
    assert Merged([source(["a", "b"], [0]), source(["a", "c"], [0])]).classes == []
