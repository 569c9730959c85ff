"""The same classes in data sets that number them differently: matched by name, never by number."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from core.data.fingerprint import fingerprint
from core.data.order import Order
from core.data.source import DataError, Raw, Source

_SHOWN = 3


class Renumbered(Source):
    """Another source with its classes in another order.  classes: all of the source's, perhaps more."""

    def __init__(self, source: Source, classes: Sequence[str]) -> None:
        self.source, self.classes, self.shard_sizes = source, list(classes), source.shard_sizes
        self.run, self.licence, self.skipped, self.ahead = source.run, source.licence, source.skipped, source.ahead
        place = {name: i for i, name in enumerate(classes)}
        self._numbers = np.array([*(place[name] for name in source.classes), -1], np.int64)  # the last: without a label

    def read(self, i: int) -> Raw:
        raw = self.source.read(i)
        return replace(raw, label=int(self._numbers[raw.label]))

    def label(self, i: int) -> int:
        return int(self._numbers[self.source.label(i)])

    def text(self, i: int) -> str:
        return self.source.text(i)

    def fingerprint(self) -> str:
        return fingerprint("renumbered", self.source.fingerprint(), self._numbers.astype("<i8").tobytes())

    def order(self, seed: int, streams: int, block: int) -> Order:
        return self.source.order(seed, streams, block)

    def fetch(self, i: int) -> bool:
        return self.source.fetch(i)


def same(source: Source, classes: Sequence[str]) -> bool:
    """Whether the classes of a source are these, in whatever order; names that come twice tell nothing apart."""
    unique = len(set(classes)) == len(classes) == len(source.classes)
    return source.classes == list(classes) or (unique and set(source.classes) == set(classes))


def numbered_as(source: Source, classes: Sequence[str], names: tuple[str, str], part: bool = False) -> Source:
    """The source with its labels numbered by `classes`.

    names: of the source and of what has the classes, for messages.  part: whether some classes may be without a sample.
    Raises DataError where the classes are others, which says which.
    """
    known = set(classes)
    if source.classes == list(classes):
        return source
    unique = len(known) == len(classes)
    if same(source, classes) or (part and unique and known.issuperset(source.classes)):
        return Renumbered(source, classes)
    found, (here, there) = set(source.classes), names
    lacks = [name for name in classes if name not in found]
    more = [name for name in source.classes if name not in known]
    said = [f"{here} lacks {len(lacks)} of the {len(classes)}{_examples(lacks)}"] if lacks else []
    said += [f"{there} lacks {len(more)} of the {len(source.classes)} of {here}{_examples(more)}"] if more else []
    said += [] if said else ["some names come twice"]
    said += [_numbers_as_names(here, found, there, known)]
    raise DataError(
        f"{here} and {there} have different classes: {'; '.join(filter(None, said))}. Classes are compared by name, in "
        "any order: give the same class folders, or the same class names, to both"
    )


def _examples(names: Sequence[str]) -> str:
    return f", for example {', '.join(map(repr, names[:_SHOWN]))}"


def _numbers_as_names(here: str, found: Collection[str], there: str, known: Collection[str]) -> str:
    """A hint where one side has names and the other only numbers."""
    bare = [all(name.isdigit() for name in names) for names in (found, known)]
    return f"the classes of {here if bare[0] else there} are bare numbers" if bare[0] != bare[1] else ""
