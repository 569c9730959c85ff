"""The parts that a data set is published in, told by their names: never read as one without being asked to."""

from __future__ import annotations

import re
from collections.abc import Iterable

from core.data.source import DataError

SPLITS = frozenset(("train", "training", "val", "valid", "validation", "dev", "test", "testing"))


def words(key: str) -> list[str]:
    """Parts of a name of which one may be a split's."""
    return re.split(r"[/._-]", key)


def in_files(keys: Iterable[str], more: str = "") -> set[str]:
    """Splits that files are of.  more: a further name of a split."""
    return {word for key in keys for word in words(key)} & (SPLITS | {more})


def check_folders(uri: str, classes: Iterable[str]) -> None:
    """Refuse a folder whose folders of images are all splits, of which each holds the classes.  Raises DataError."""
    found = set(classes)
    if {name.lower() for name in found} <= SPLITS:
        check_single(uri, found)


def check_single(uri: str, found: set[str]) -> None:
    """Raises DataError where there are several splits."""
    if len(found) > 1:
        names = sorted(found)
        raise DataError(
            f"{uri}: holds the splits {', '.join(names)}; choose one: SPLIT={names[0]} of make shards; elsewhere give "
            f"what holds that one alone, such as {uri}/{names[0]}"
        )
