"""Folders of a machine: named by the command at hand, else by the machine's environment, never by what is stored.

Whoever may write to a store could otherwise choose where on this machine files are made and removed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from core.recipe import Recipe

CACHE, SPOOL = "RETORT_CACHE", "RETORT_SPOOL"
FIELDS = {CACHE: ("loader", "cache_dir"), SPOOL: ("checkpoint", "spool")}


def folder(variable: str, given: str) -> str:
    """The folder that was given, else this machine's own; "" = none is named."""
    return given or os.environ.get(variable, "")


def named(recipe: Recipe) -> dict[str, str]:
    """Variables that take a recipe's folders to processes that read the recipe from a store."""
    given = {variable: getattr(getattr(recipe, group), field) for variable, (group, field) in FIELDS.items()}
    return {variable: os.path.abspath(path) for variable, path in given.items() if path}


def nowhere(recipe: Recipe) -> Recipe:
    """The recipe without folders of a machine: what is stored, and what is taken from a store."""
    groups = {group: dataclasses.replace(getattr(recipe, group), **{field: ""}) for group, field in FIELDS.values()}
    return dataclasses.replace(recipe, **groups)


@contextmanager
def told(recipe: Recipe) -> Iterator[None]:
    """Let what is done or started here see a recipe's folders, whatever it reads from a store."""
    own = named(recipe)
    before = {name: os.environ.get(name) for name in own}
    os.environ |= own
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
