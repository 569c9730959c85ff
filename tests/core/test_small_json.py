"""JSON that strangers and broken disks have written is read within bounds, or said to be unreadable."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path

import pytest

from core import small_json
from core.folder import FileStore
from core.small_json import MOST_DEEP, Excessive, Unreadable, parse, read
from core.storage import MissingObject, StoreError


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


DEEP = ["[" * 100_000, nested(100_000), nested(MOST_DEEP + 1), '{"a":' * 500 + "1" + "}" * 500]


@pytest.mark.parametrize("text", DEEP)
def test_what_is_nested_too_deep_is_unreadable_and_no_crash(text: str) -> None:
    with pytest.raises(Excessive, match=r"unreadable: x\.json: more than 64 lists and objects in each other"):
        parse(text, object, "x.json")


def test_what_is_nested_as_deep_as_allowed_is_read() -> None:
    assert parse(nested(MOST_DEEP), list, "x.json")


def test_a_deep_stack_of_the_caller_does_not_end_it() -> None:
    def down(levels: int) -> None:
        if levels:
            down(levels - 1)
        else:
            with pytest.raises(Excessive):
                parse(nested(100_000), list, "x.json")

    down(sys.getrecursionlimit() // 2)


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "no JSON"), (b"{", "no JSON"), (b"\xff\x00\x00", "no JSON"), ("9" * 5000, "no JSON"),
     (b"[]", "an object belongs there, not a list"), (b"null", "not null"), (b"3", "not int"), (b'"x"', "not str")],
)  # fmt: skip
def test_what_is_of_another_kind_is_named(data: bytes | str, words: str) -> None:
    with pytest.raises(Unreadable, match=f"unreadable: a/x.json: .*{words}"):
        parse(data, dict, "a/x.json")


def test_numbers_that_are_none_are_read_as_they_are_written() -> None:
    assert math.isnan(parse("[NaN]", list, "x")[0])


def test_of_an_object_no_more_is_fetched_than_belongs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    store.put("a/x.json", b"[" + b" " * 100 + b"]")
    monkeypatch.setattr(store, "get", lambda key: pytest.fail("all of it was fetched"))
    assert read(store, "a/x.json", list, most=102) == []
    with pytest.raises(Excessive, match=f"unreadable: file://{tmp_path}/a/x.json: larger than the 101 bytes"):
        read(store, "a/x.json", list, most=101)
    with pytest.raises(MissingObject):
        read(store, "a/y.json", list)


def test_the_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Excessive("x.json", "too large")))  # noqa: S301 - its own
    assert (type(error), str(error), error.why) == (Excessive, "unreadable: x.json: too large", "too large")


def test_it_is_an_error_of_the_store_and_of_a_value() -> None:
    assert issubclass(Unreadable, StoreError)
    assert issubclass(Unreadable, ValueError)
    assert small_json.SMALL < small_json.LARGE
