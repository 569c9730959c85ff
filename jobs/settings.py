"""The options of a command: from its arguments, else from the environment variables that the Makefile exports."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.text import control
from jobs.errors import UserError, line

if TYPE_CHECKING:
    from core.recipe import Recipe
    from jobs.cluster import Cluster

WORDS = ("set", "sweep", "select")  # cut into words, which are judged where they end up
PROSE = ("licence",)
TRUE, FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True)
class Settings:
    """One command's options; each can come from the variable named like it, in capitals."""

    recipe: str = ""
    run: str = ""
    set: tuple[str, ...] = ()
    profile: str = ""
    launcher: str = ""
    store: str = ""
    dry: bool = False
    fresh: bool = False
    dirty: bool = False
    detach: bool = False
    json: bool = False
    eval: str = ""
    format: str = ""
    gpu: str = ""
    gpus: int = 0
    nproc: int = 0
    force: bool = False
    days: int = 0
    src: str = ""
    dst: str = ""
    split: str = ""
    short: int = 0
    quality: int = 90
    workers: int = 0
    licence: str = ""
    tail: int = 0
    cluster: str = ""
    sweep: str = ""
    after: str = ""
    rank: str = ""
    follow: bool = False
    quick: bool = False
    views: int = 0
    codec: str = ""
    verify: bool = False
    advise: bool = False
    select: str = ""
    base: str = ""
    tag: str = ""
    target: str = ""

    def need(self, name: str) -> str:
        """A value that this command cannot do without.  Raises UserError."""
        value = str(getattr(self, name))
        if not value:
            raise UserError(f"{name.upper()} is not set: give {name.upper()}=... to make, or name it to python -m jobs")
        return value

    def load_recipe(self) -> Recipe:
        """The recipe resolved with profile and overrides, its method's options checked.  Raises ConfigError."""
        name = self.need("recipe")
        from core.config import load

        recipe = load(name, self.profile, list(self.set))
        from core.registry import complete  # imports torch: only for a recipe that is right so far

        return complete(recipe)

    def site(self) -> Cluster:
        """The settings of CLUSTER, else of RETORT_CLUSTER.  Raises ConfigError."""
        from jobs.cluster import load

        return load(self.cluster or os.environ.get("RETORT_CLUSTER", ""))

    def root(self, recipe: Recipe | None = None) -> str:
        """URI of the store: SET, then --store, the recipe, the cluster file, RETORT_STORE, a folder under this one."""
        by_set = any(item.startswith("store=") for item in self.set)
        own = recipe.store if recipe else ""
        chosen = (own if by_set else "") or self.store or own
        if not chosen and (self.cluster or os.environ.get("RETORT_CLUSTER")):
            chosen = self.site().store
        chosen = chosen or os.environ.get("RETORT_STORE", "")
        return check_uri(chosen or f"file://{Path.cwd() / '.retort' / 'store'}", "store")


def check_uri(uri: str, what: str) -> str:
    """The URI without trailing slash.  Raises UserError unless it is s3://bucket/... or file:///dir, in one line."""
    scheme, _, rest = line(uri, what).partition("://")
    if (scheme == "s3" and rest.strip("/")) or (scheme == "file" and rest.startswith("/")):
        return uri.rstrip("/")
    raise UserError(f"{what}: {uri!r} is not a store; valid are s3://bucket/prefix and file:///absolute/folder")


def collect(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """Arguments win over variables; an empty variable counts as absent.  Raises UserError.

    Names, addresses and paths end up in commands, scripts and manifests: each is one line of text.
    """
    values: dict[str, Any] = {}
    for f in fields(Settings):
        given = getattr(arguments, f.name, None)
        text = environment.get(f.name.upper(), "")
        if f.name == "set":
            values["set"] = tuple(item for part in (text, *(given or ())) for item in split(part))
        elif given not in (None, False):
            values[f.name] = given
        elif text:
            values[f.name] = _parse(f.name, str(f.type), text)
        if isinstance(own := values.get(f.name), str) and f.name not in WORDS:
            _plain(f.name, own)
    return Settings(**values)


def _plain(name: str, text: str) -> None:
    if name not in PROSE:
        line(text, name.upper())
    elif found := control(text, lines=True):
        raise UserError(f"{name.upper()}: {text!r} holds {found}")


def split(text: str) -> list[str]:
    """`a.b=c d.e='f g'` -> items, with a shell's quotes.  Raises UserError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"SET: {text!r}: {error}") from None


def _parse(name: str, kind: str, text: str) -> Any:
    if kind == "bool":
        if text.lower() not in TRUE + FALSE:
            raise UserError(f"{name.upper()}: {text!r} is neither 1 nor 0")
        return text.lower() in TRUE
    if kind == "int":
        try:
            return int(text)
        except ValueError:
            raise UserError(f"{name.upper()}: {text!r} is not a whole number") from None
    return text
