"""features SELECT=...: the sentences that a recipe's images show, written as tables of their own."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING

from jobs.errors import OK, UserError, nearest
from jobs.verbs.submit import say

if TYPE_CHECKING:
    from core.features.select import Rules
    from core.recipe import Recipe


def choose(recipe: Recipe, root: str, text: str) -> int:
    """recipe: all of whose vectors are stored.  text: of SELECT.  Raises UserError, and as `core.features.select`."""
    from core.features import run
    from core.features.select import select
    from core.storage import resolve

    to, rules = parse(text)
    stored = dataclasses.replace(recipe, features="require")
    count = select(stored, resolve(to, root), rules, root, run.device(recipe), say)
    used = f"features=auto data.codec={recipe.data.codec} data.texts={to}"  # whose vectors stand in tables
    print(f'next: make submit RECIPE={recipe.name} SET="{used}" trains with these {count:,} sentences')
    return OK


def parse(text: str) -> tuple[str, Rules]:
    """`ADDRESS top=10 least=0.2 english=0.9 names=ADDRESS`.  Raises UserError."""
    from core.features.select import Rules

    to, *items = shlex.split(text)
    kinds = {name: type(value) for name, value in dataclasses.asdict(Rules()).items()}
    values = {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in kinds:
            raise UserError(f"SELECT: {name!r} is not one of {', '.join(kinds)}{nearest(name, list(kinds))}")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise UserError(f"SELECT: {item!r}: {name} must be of type {kinds[name].__name__}") from None
    rules = Rules(**values)
    if "://" not in to and not to.startswith("store:"):
        raise UserError(f"SELECT: {to!r} is no address; first give the folder to write to, such as store:data/chosen")
    if rules.top < 1:
        raise UserError(f"SELECT: top={rules.top} chooses nothing; use 1 at least")
    return to, rules
