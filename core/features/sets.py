"""A set of stored features in the store: the outputs of one teacher for one data set, written in parts.

features/<16 digits>/about.json              what they are of, the whole fingerprint, and how rows are divided
.../view-0/part-000000-<crc>.safetensors     rows of a part: cls, patch, their scales, boxes
.../view-0/part-000000.json                  its size, checksum and unreadable rows: from here on the part counts
.../view-0/index.json                        all of those together, once the view is complete
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core import small_json
from core.features.about import About, differences, fingerprint
from core.features.codec import FeatureError
from core.storage import MissingObject, Store, crc32c, open_store

Ints = NDArray[np.int64]
FOLDER, ABOUT, INDEX = "features", "about.json", "index.json"
READERS = 16


@dataclass(frozen=True)
class Part:
    """A finished part.  bad: rows in it whose image cannot be read."""

    rows: int
    bytes: int
    crc32c: int
    bad: list[int]


def division(shard_sizes: Ints, repeats: int, rows: int) -> list[int]:
    """Where parts end: small shards are put together and large ones cut, so that a part has about `rows` rows and
    lies within one shard or holds whole ones."""
    ends, start = [], 0
    for end in np.cumsum(np.tile(shard_sizes, repeats)).tolist():
        if end - start >= rows:
            pieces = max(1, round((end - start) / rows))
            ends += [start + (end - start) * i // pieces for i in range(1, pieces + 1)]
            start = end
    if not ends or ends[-1] < int(shard_sizes.sum()) * repeats:
        ends.append(int(shard_sizes.sum()) * repeats)
    return ends


def is_set(folder: Store) -> bool:
    """Whether this is the folder of a set: its name is that of what it says it is of.  Raises StoreError."""
    try:
        content = json.loads(folder.get(ABOUT))
        named = fingerprint(content["about"])
    except (MissingObject, ValueError, TypeError, KeyError, RecursionError):
        return False
    return named == content.get("fingerprint") and folder.uri.endswith(f"/{named[:16]}")


class FeatureSet:
    """One such folder.  ends: (parts,), rows at which parts end."""

    def __init__(self, store: Store, about: About, ends: Sequence[int]) -> None:
        self.store, self.about, self.ends = store, about, list(ends)

    def __repr__(self) -> str:
        return self.store.uri

    @property
    def name(self) -> str:
        """Of its folder in the feature store."""
        return fingerprint(self.about)[:16]

    def begin(self) -> None:
        """Write down what the set is; where that is done, do it again, so that nobody takes it for an old one.

        Raises FeatureError, StoreError.
        """
        content = {"fingerprint": fingerprint(self.about), "about": self.about, "ends": self.ends}
        data = json.dumps(content).encode()
        if not self.store.put_if_absent(ABOUT, data):
            there = _found(self.store, self.about)
            if there is not None and there.ends != self.ends:
                raise FeatureError(f"{self.store.uri}: another worker has begun other parts; start this one again")
            self.store.put(ABOUT, data)

    def rows(self, part: int) -> range:
        return range(self.ends[part - 1] if part else 0, self.ends[part])

    def done(self, view: int) -> set[int]:
        """Parts that are finished."""
        suffix, keys = ".json", (entry.key for entry in self.store.list(f"view-{view}/part-"))
        return {int(key[-len(suffix) - 6 : -len(suffix)]) for key in keys if key.endswith(suffix)}

    def is_done(self, view: int, number: int) -> bool:
        return self.store.size(f"{key(view, number)}.json") is not None

    def finished(self, view: int) -> dict[int, Part]:
        """Finished parts, whose files have the size that they should have.  Raises FeatureError, StoreError."""
        sizes = {entry.key: entry.size for entry in self.store.list(f"view-{view}/")}
        index = f"view-{view}/{INDEX}"
        parts = self._parts(view, self._json(index), index) if index in sizes else self._single(view)
        for number, part in parts.items():
            name = file(view, number, part)
            if sizes.get(name) != part.bytes:
                own = sizes.get(name, "no")
                raise FeatureError(f"{self.store.uri}/{name} has {own} bytes, not {part.bytes}: {MEND}")
        return parts

    def _single(self, view: int) -> dict[int, Part]:
        """Finished parts by what is written of each."""
        numbers = sorted(self.done(view))
        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(numbers, pool.map(lambda number: self.part(view, number), numbers), strict=True))

    def _parts(self, view: int, index: dict[str, Any], name: str) -> dict[int, Part]:
        try:
            return {int(number): self._sound(view, int(number), content) for number, content in index.items()}
        except ValueError as error:  # also a FeatureError
            if isinstance(error, FeatureError):
                raise
            raise FeatureError(f"{self.store.uri}/{name} is not what was written there: {MEND}") from None

    def commit(self, view: int, number: int, path: Path, bad: list[int]) -> bool:
        """Upload a part; of two who made the same one the first counts, and this says whether it was the first.

        Files are named by their content, so that of two devices that round in different ways none writes over what the
        other has given the checksum of.  Raises StoreError.
        """
        data = path.read_bytes()
        part = Part(len(self.rows(number)), len(data), crc32c(data), bad)
        name, told = file(view, number, part), f"{key(view, number)}.json"
        self.store.put_file(name, path)
        first = self.store.put_if_absent(told, json.dumps(asdict(part)).encode())
        if not first and file(view, number, self.part(view, number)) != name:
            self.store.delete(name)
        return first

    def seal(self, view: int) -> bool:
        """Write the view's index if all parts are there; whether they are.  Raises FeatureError, StoreError."""
        if len(self.done(view)) < len(self.ends):
            return False
        if self.store.size(f"view-{view}/{INDEX}") is None:
            parts = {str(number): asdict(part) for number, part in self.finished(view).items()}
            self.store.put(f"view-{view}/{INDEX}", json.dumps(parts).encode())
        return True

    def drop(self, view: int, number: int) -> None:
        """Make a part count no longer, so that it is made again."""
        files = [entry.key for entry in self.store.list(f"{key(view, number)}-")]
        self.store.delete(f"view-{view}/{INDEX}", f"{key(view, number)}.json", *files)

    def drop_wrong_index(self, view: int) -> bool:
        """Remove a view's index that is damaged or of other parts than are there; whether there was such a one."""
        name = f"view-{view}/{INDEX}"
        try:
            wrong = self._parts(view, self._json(name), name) != self._single(view)
        except MissingObject:
            return False
        except FeatureError:
            wrong = True
        if wrong:
            self.store.delete(name)
        return wrong

    def part(self, view: int, number: int) -> Part:
        """Raises FeatureError, StoreError."""
        return self._sound(view, number, self._json(f"{key(view, number)}.json"))

    def _sound(self, view: int, number: int, content: Any) -> Part:
        try:
            part = Part(**content)
            numbers = [part.rows, part.bytes, part.crc32c, *part.bad]
            sound = number < len(self.ends) and part.rows == len(self.rows(number))
            sound = sound and all(isinstance(each, int) for each in numbers)
        except TypeError:
            sound = False
        if not sound:
            raise FeatureError(f"{self.store.uri}/{key(view, number)}.json does not fit the set: {MEND}")
        return part

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return small_json.read(self.store, name, dict, small_json.LARGE)
        except small_json.Unreadable:
            raise FeatureError(f"{self.store.uri}/{name} is not what was written there: {MEND}") from None


MEND = "`make features RECIPE=... VERIFY=1` drops what is damaged, and the next `make features` makes it again"


def key(view: int, part: int) -> str:
    return f"view-{view}/part-{part:06d}"


def file(view: int, number: int, part: Part) -> str:
    """Key of a part's tensors."""
    return f"{key(view, number)}-{part.crc32c:08x}.safetensors"


def find(root: str, about: About) -> FeatureSet | None:
    """The set of exactly these features; None without.  Raises FeatureError, StoreError."""
    return _found(_store(root, about), about)


def _found(store: Store, about: About) -> FeatureSet | None:
    name = fingerprint(about)
    try:
        content = small_json.read(store, ABOUT, dict, small_json.LARGE)
        if content["fingerprint"] != name or fingerprint(content["about"]) != name:
            raise FeatureError(
                f"{store.uri}/{ABOUT}: wanted are features {name}, these are {fingerprint(content['about'])}; remove "
                "that folder, or take another store"
            )
        ends = [int(end) for end in content["ends"]]
        if ends != sorted(set(ends)) or ends[-1:] != [about["rows"]]:
            raise ValueError
        return FeatureSet(store, about, ends)
    except MissingObject:
        return None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, FeatureError):
            raise
        raise FeatureError(f"{store.uri}/{ABOUT} is damaged; remove that folder and make the features again") from None


def planned(root: str, about: About, ends: Sequence[int]) -> FeatureSet:
    """The set of these features, be it there or to be begun; how it is divided is settled by whoever begins it."""
    return find(root, about) or FeatureSet(_store(root, about), about, ends)


def _store(root: str, about: About) -> Store:
    return open_store(root).sub(f"{FOLDER}/{fingerprint(about)[:16]}")


def nearest(root: str, about: About) -> tuple[str, list[str]] | None:
    """Fingerprint of the stored set that differs least, and in what; None when nothing of this teacher is stored."""
    store, best = open_store(root).sub(FOLDER), None
    for entry in store.list():
        if entry.key.endswith(f"/{ABOUT}"):
            try:
                content = small_json.read(store, entry.key, dict, small_json.LARGE)
                same = content["about"]["teacher"]["model"] == about["teacher"]["model"]
                found = differences(content["about"], about)
            except (ValueError, KeyError, TypeError):  # damaged: of these, whoever wants them is told
                continue
            if same and (best is None or len(found) < len(best[1])):
                best = content["fingerprint"], found
    return best
