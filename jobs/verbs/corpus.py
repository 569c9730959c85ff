"""features SELECT=...: the sentences that a recipe's images show, written as tables of their own."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING

from jobs.errors import OK, UserError, nearest
from jobs.steps import elsewhere
from jobs.verbs.submit import say

if TYPE_CHECKING:
    from core.features.select import Rules
    from core.recipe import Recipe
    from jobs.settings import Settings


def choose(recipe: Recipe, root: str, settings: Settings) -> int:
    """recipe: all of whose vectors are stored.  Raises UserError, and as `core.features.select`."""
    from core.features import run
    from core.features.select import select
    from core.storage import resolve

    to, rules = parse(settings.select)
    stored = dataclasses.replace(recipe, features="require")
    count = select(stored, resolve(to, root), rules, root, run.device(recipe), say)
    used = [*settings.set, "features=auto", f"data.codec={recipe.data.codec}", f"data.texts={to}"]  # vectors in tables
    print(f"{count:,} sentences are in {to}")
    profile = f" PROFILE={settings.profile}" if settings.profile else ""
    words = f"RECIPE={shlex.quote(settings.recipe)}{profile} SET={shlex.quote(shlex.join(used))}"
    print(f"next: make submit {words}{elsewhere(root)}")
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
