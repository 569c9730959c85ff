"""The one reader of JSON that others may have written: bounded in size and depth, of the kind that is expected.

Whoever may write to a store or has made a data set chooses these bytes, and a broken disk may, too. So nothing else in
Retort parses what it has read there.
"""

from __future__ import annotations

import json
from typing import Any, TypeVar

from core.storage import Store, StoreError

SMALL = 1 << 20  # bytes of a record, a transition, a heartbeat
LARGE = 1 << 28  # of what lists the parts of a checkpoint or of a data set
MOST_DEEP = 64  # levels of lists and objects in each other
KINDS: dict[type, str] = {dict: "an object", list: "a list"}
T = TypeVar("T")


class Unreadable(StoreError, ValueError):  # noqa: N818 (says what is the matter)
    """What was read is not the JSON that belongs there."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(where, why)
        self.where, self.why = where, why

    def __str__(self) -> str:
        return f"unreadable: {self.where}: {self.why}"


class Excessive(Unreadable):
    """It is larger or deeper than what belongs there can be."""


def parse(data: bytes | str, kind: type[T], where: str, most: int = SMALL) -> T:
    """The value, which must be of `kind`; `object` takes any.  where: for the message.  Raises Unreadable.

    NaN and infinities are taken, as Python writes them.
    """
    if len(data) > most:
        raise _too_large(where, most)
    try:
        value = json.loads(data)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise Unreadable(where, f"no JSON ({error})") from None
    if _depth(value) > MOST_DEEP:
        raise _too_deep(where)
    if not isinstance(value, kind):
        raise Unreadable(where, f"{KINDS.get(kind, kind.__name__)} belongs there, not {_name(value)}")
    return value


def read(store: Store, key: str, kind: type[T], most: int = SMALL) -> T:
    """The JSON of an object of the store, of which no more is fetched than belongs there.

    Raises Unreadable, MissingObject, StoreError.
    """
    return parse(fetch(store, key, most), kind, f"{store.uri}/{key}", most)


def fetch(store: Store, key: str, most: int = SMALL) -> bytes:
    """An object's bytes.  Raises Excessive where they are more than that, MissingObject, StoreError."""
    data = store.get_range(key, 0, most + 1)
    if len(data) > most:
        raise _too_large(f"{store.uri}/{key}", most)
    return data


def _depth(value: object) -> int:
    """Levels; at most one more than are allowed are counted, and without recursion."""
    level: list[Any] = [value]
    depth = 0
    while depth <= MOST_DEEP:
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            break
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
        depth += 1
    return depth


def _too_deep(where: str) -> Excessive:
    return Excessive(where, f"more than {MOST_DEEP} lists and objects in each other")


def _too_large(where: str, most: int) -> Excessive:
    return Excessive(where, f"larger than the {most:,} bytes that belong there")


def _name(value: object) -> str:
    return KINDS.get(type(value), "null" if value is None else type(value).__name__)
